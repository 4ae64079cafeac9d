"""Small ops at Qwen3-8B's shapes on the present GPU, beside their floors and PyTorch's eager ops.

The floor is every byte moved once at the device-copy rate; operands rotate, so that they come from memory.
Eager PyTorch runs from a CUDA graph, so that its launches cost what ours do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import launcher  # of tests/gpu, where suites.py finds it, as what follows
import torch
from sample_rows import requests
from torch.nn import functional

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS

for module in ("norm", "elementwise", "embedding", "rope", "sample.sample", "sample.logprobs"):
    importlib.import_module(f"makeready.kernels.{module}_triton")

BANDWIDTH = 3.0e12  # bytes/s of a device copy, read and written, on an H100
ROTATED = 150e6  # bytes that calls rotate over; L2 has 50 MiB
HIDDEN, INNER, HEADS, HEAD_DIM, VOCABULARY = 4096, 12288, 32, 128, 151936
TOKENS = (1, 16, 64, 256, 8192)
ROWS = (1, 16, 64, 256)

Tensors = dict[str, torch.Tensor]
Eager = Callable[[Tensors], object]


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, device="cuda").int()


def _cases(tokens: int) -> list[tuple[str, Callable[[], Tensors], dict[str, Any], float, Eager]]:
    """Name, operands, attributes, bytes moved, and the same in eager PyTorch."""
    hidden, rotary = 2 * tokens * HIDDEN, 4 * tokens * HEAD_DIM
    weight, table = _normal(HIDDEN), torch.rand(4096, HEAD_DIM, device="cuda")
    embeddings, history = _normal(VOCABULARY, HIDDEN), _ints(100, 257, 4096)
    eps = 1e-6

    def norm(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (HIDDEN,), weight, eps)

    def rotate(t: Tensors) -> torch.Tensor:
        cos, sin = t["rows"].unsqueeze(1).chunk(2, -1)
        first, second = t["x"].view(tokens, HEADS, HEAD_DIM).chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).bfloat16()

    def silu_mul(t: Tensors) -> torch.Tensor:
        gate, up = t["gate_up"].chunk(2, -1)
        return functional.silu(gate) * up

    slot = _ints(256, tokens)
    return [
        (
            "rms_norm",
            lambda: {"x": _normal(tokens, HIDDEN), "weight": weight},
            {"eps": eps},
            2 * hidden,
            lambda t: norm(t["x"]),
        ),
        (
            "add_rms_norm",
            lambda: {"x": _normal(tokens, HIDDEN), "residual": _normal(tokens, HIDDEN), "weight": weight},
            {"eps": eps},
            4 * hidden,
            lambda t: norm(t["x"] + t["residual"]),
        ),
        (
            "silu_mul",
            lambda: {"gate_up": _normal(tokens, 2 * INNER)},
            {},
            6 * tokens * INNER,
            silu_mul,
        ),
        (
            "embedding",
            lambda: {"ids": _ints(VOCABULARY, tokens), "weight": embeddings},
            {},
            2 * hidden,
            lambda t: functional.embedding(t["ids"], t["weight"]),
        ),
        (
            "load_tokens",
            lambda: {
                "token_ids": _ints(100, tokens),
                "token_slot": slot,
                "positions": torch.arange(tokens, device="cuda").int() % 4096,
                "history": history,
            },
            {},
            20 * tokens,
            lambda t: torch.where(t["token_ids"] >= 0, t["token_ids"], t["history"][t["token_slot"], t["positions"]]),
        ),
        (
            "rope_rows",
            lambda: {"positions": _ints(4096, tokens), "table": table},
            {},
            2 * rotary,
            lambda t: t["table"][t["positions"]],
        ),
        (
            "rope",
            lambda: {"x": _normal(tokens, HIDDEN), "rows": torch.rand(tokens, HEAD_DIM, device="cuda")},
            {"heads": HEADS, "head_dim": HEAD_DIM},
            2 * hidden + rotary,
            rotate,
        ),
    ]  # fmt: skip


def _measure(
    name: str,
    size: int,
    make: Callable[[], Tensors],
    attrs: Mapping[str, Any],
    nbytes: float,
    eager: Eager | None,
    label: str = "",
) -> Iterator[dict[str, Any]]:
    sets = [make() for _ in range(max(2, min(16, round(ROTATED / nbytes + 0.5))))]
    call = launcher.op_call(CONTRACTS[name], sets[0], attrs)
    reps = max(20, len(sets))
    other = None
    if eager is not None:
        rounds = -(-reps // len(sets))

        def calls() -> None:
            for tensors in sets * rounds:
                eager(tensors)

        other = launcher.time_graph(calls) / (rounds * len(sets))
    for kernel in registry.cuda_kernels(name):
        for candidate in kernel.candidates(call):
            yield {
                "op": name + label,
                "size": size,
                "way": candidate.name,
                "seconds": launcher.time(candidate, call, sets, reps),
                "floor": nbytes / BANDWIDTH,
                "eager": other,
            }


def _row_ops(rows: int) -> Iterator[dict[str, Any]]:
    nbytes = 4.0 * rows * VOCABULARY
    knobs: tuple[tuple[str, dict[str, float]], ...] = (
        (" greedy", {}),
        (" temperature", {"temperature": 0.8}),
        (" top-k 20, top-p 0.95", {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        (" top-p 0.9", {"temperature": 0.8, "top_p": 0.9}),
        (" min-p 0.05", {"temperature": 0.8, "min_p": 0.05}),
        (" penalties", {"repetition_penalty": 1.1}),
    )
    base = {
        k: v.cuda()
        for k, v in requests(rows, VOCABULARY, padding=0, greedy=True, context=1024, spread=3.0).items()
    }
    for label, changes in knobs:

        def make(changes: Mapping[str, float] = changes) -> Tensors:
            made = {k: torch.full_like(base[k], value) for k, value in changes.items()}
            logits = base["logits"] + torch.randn_like(base["logits"])
            return {**base, **made, "logits": logits, "history": base["history"].clone()}

        draws = "temperature" in changes
        eager: Eager = (lambda t: t["logits"].softmax(-1)) if draws else (lambda t: t["logits"].argmax(-1))
        yield from _measure("sample", rows, make, {}, nbytes, eager, label)
    for asked in (-1, 0, 20):
        top = torch.full((rows + 1,), asked, dtype=torch.int32, device="cuda")

        def ask(top: torch.Tensor = top) -> Tensors:
            slots = torch.arange(rows, device="cuda").int()
            logits = _normal(rows, VOCABULARY, dtype=torch.float32)
            return {
                "logits": logits,
                "tokens": _ints(VOCABULARY, rows),
                "row_slot": slots,
                "top_logprobs": top,
            }

        best: Eager | None = (lambda t: t["logits"].log_softmax(-1).topk(20)) if asked > 0 else None
        yield from _measure("token_logprobs", rows, ask, {"max_top": 20}, nbytes, best, f" {asked}")


def small_ops() -> list[dict[str, Any]]:
    """Seconds of every way of every op and size, with its floor and eager PyTorch's time where there is one."""
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for tokens in TOKENS:
        for name, make, attrs, nbytes, eager in _cases(tokens):
            found += _measure(name, tokens, make, attrs, nbytes, eager)
    for rows in ROWS:
        found += _row_ops(rows)
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """µs, the share of the floor, and eager PyTorch's time over ours."""
    lines = [f"{'op':28} {'size':>6} {'µs':>9} {'floor':>7} {'eager':>7}"]
    for row in found:
        took = row["seconds"]
        eager = "" if row["eager"] is None else f"{row['eager'] / took:.2f}"
        lines.append(
            f"{row['op']:28} {row['size']:6} {1e6 * took:9.2f} {row['floor'] / took:7.2f} {eager:>7}  {row['way']}"
        )
    return lines
