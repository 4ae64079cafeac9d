"""Random requests for ``sample``, and how close their closest decision was."""

from __future__ import annotations

from typing import Any

import torch

from makeready.kernels.sample.filters import adjust, candidates, survivors
from makeready.kernels.sample.noise import exponential_noise

MARGIN = 2e-5  # decisions closer than this may fall either way: in scores, or in tenths of a mass

FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 20, "top_p": 0.95},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 1},
    {"top_p": 0.999, "temperature": 3.0},
    {"top_k": 500, "top_p": 0.7, "min_p": 0.001},
    {"top_k": 60000},
    {"top_p": 0.0},
    {"top_k": 40},
    {"top_p": 0.8, "min_p": 0.02, "temperature": 2.0},
    {"top_p": 0.2, "temperature": 3.0},
)
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"bias": True},
    {"min_new_tokens": 10**6},
    {"repetition_penalty": 0.8, "frequency_penalty": -0.1, "bias": True, "min_new_tokens": 10**6},
    {"mask": True},
    {"mask": True, "bias": True, "repetition_penalty": 1.2},
)
_FLOATS = {
    "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}  # fmt: skip


def requests(
    rows: int,
    vocabulary: int,
    *,
    seed: int = 0,
    context: int = 300,
    padding: int = 1,
    greedy: bool = False,
    spread: float = 2.5,
) -> dict[str, torch.Tensor]:
    """Operands of ``sample`` on the CPU for ``rows`` requests of every sort and ``padding`` rows.

    Args:
        greedy: ask for nothing at all.
        spread: standard deviation of the logits, which lie on a grid of 2**-10 so that some are equal.
    """
    draw = torch.Generator().manual_seed(seed)
    slots = rows + 3
    logits = torch.randn(rows + padding, vocabulary, generator=draw) * spread
    logits = (logits * 1024).round() / 1024
    logits[rows:] = float("nan")
    op = {"logits": logits, "row_slot": torch.full((rows + padding,), slots - 1, dtype=torch.int32)}
    op["row_slot"][:rows] = torch.randperm(slots - 1, generator=draw)[:rows]
    op["context_len"] = torch.zeros(rows + padding, dtype=torch.int32)
    op["context_len"][:rows] = torch.randint(1, context + 1, (rows,), generator=draw)
    op["history"] = torch.randint(vocabulary, (slots, context), generator=draw).int()
    op["history"][:, ::2] %= 50  # many repeats
    op["prompt_len"] = torch.ones(slots, dtype=torch.int32)
    for name, default in _FLOATS.items():
        op[name] = torch.full((slots,), default)
    op["top_k"] = torch.zeros(slots, dtype=torch.int32)
    op["min_new_tokens"] = torch.zeros(slots, dtype=torch.int32)
    op["seed"] = torch.randint(-(2**63), 2**63 - 1, (slots,), generator=draw)
    op["stop_ids"] = torch.full((slots, 5), -1, dtype=torch.int32)
    op["bias_ids"] = torch.full((slots, 300), -1, dtype=torch.int32)
    op["bias_values"] = torch.randn(slots, 300, generator=draw) * 3
    op["masked"] = torch.zeros(slots, dtype=torch.int32)
    op["allowed"] = torch.zeros(slots, -(-vocabulary // 32), dtype=torch.int32)
    for r in range(rows):
        slot, length = int(op["row_slot"][r]), int(op["context_len"][r])
        op["prompt_len"][slot] = torch.randint(1, length + 1, (), generator=draw)
        if greedy:
            continue
        sampled = r % 11 != 0
        knobs = {"temperature": (0.3, 0.7, 1.0)[r % 3]} if sampled else {}
        knobs |= (FILTERS[(r * 7 + r // 12) % len(FILTERS)] if sampled else {}) | CHANGES[r % len(CHANGES)]
        for name in knobs.keys() - {"bias", "mask"}:
            op[name][slot] = knobs[name]
        if knobs.get("mask"):
            op["masked"][slot] = 1
            few = torch.randint(-(2**31), 2**31 - 1, op["allowed"].shape[1:], generator=draw).int()
            op["allowed"][slot] = few & (few << 3)
            op["allowed"][slot, 0] |= 1  # a token is left
        if knobs.get("bias"):
            count = min(200, vocabulary)
            op["bias_ids"][slot, 1 : 1 + count] = torch.randperm(vocabulary, generator=draw)[:count].int()
        if "min_new_tokens" in knobs:  # the most probable tokens, which must not come
            op["stop_ids"][slot, 1:] = logits[r].topk(4).indices.int()
    return op


def adjusted(op: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """The reference's adjusted logits of one row."""
    slot, length = int(op["row_slot"][row]), int(op["context_len"][row])
    prompt = int(op["prompt_len"][slot])
    penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
    return adjust(
        op["logits"][row],
        prompt=op["history"][slot, :prompt],
        output=op["history"][slot, prompt:length],
        stop_ids=op["stop_ids"][slot],
        bias_ids=op["bias_ids"][slot],
        bias_values=op["bias_values"][slot],
        allowed=op["allowed"][slot] if op["masked"][slot] else None,
        min_new_tokens=int(op["min_new_tokens"][slot]),
        **{name: float(op[name][slot]) for name in penalties},
    )


def margin(op: dict[str, torch.Tensor], row: int) -> float:
    """How far the closest decision about a row's token was from falling the other way."""
    slot = int(op["row_slot"][row])
    knob = {name: op[name][slot].item() for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    if knob["temperature"] <= 0:
        return 1.0
    left = candidates(adjusted(op, row), knob["temperature"])
    closest = 1.0
    if 0 < knob["top_k"] < len(left.ids):
        left = survivors(left, top_k=int(knob["top_k"]))
    if knob["top_p"] < 1:
        mass = left.gaps.double().sort(descending=True).values.exp()
        reached = mass.cumsum(0) / mass.sum()
        ends = torch.cat((mass[1:] < mass[:-1], torch.tensor([True])))  # only between unequal tokens
        closest = min(closest, 10 * (reached[ends] - knob["top_p"]).abs().min().item())
        left = survivors(left, top_p=knob["top_p"])
    if knob["min_p"] > 0:
        closest = min(closest, (left.gaps.double().exp() / knob["min_p"] - 1).abs().min().item())
        left = survivors(left, min_p=knob["min_p"])
    noise = exponential_noise(int(knob["seed"]), int(op["context_len"][row]), left.ids).double()
    score = (left.gaps.double() - noise.log()).sort(descending=True).values
    return min(closest, (score[0] - score[1]).item()) if len(score) > 1 else closest
