"""Small ops at Qwen3-8B's shapes on the present GPU, beside their floors and PyTorch's eager ops.

    python tests/gpu/bench_small_ops.py

The floor is every byte moved once at the device-copy rate; operands rotate, so that they come from memory.
Eager PyTorch runs from a CUDA graph, so that its launches cost what ours do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

import launcher
from sample_rows import requests

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
) -> None:
    sets = [make() for _ in range(max(2, min(16, round(ROTATED / nbytes + 0.5))))]
    call = launcher.op_call(CONTRACTS[name], sets[0], attrs)
    reps = max(20, len(sets))
    other = float("nan")
    if eager is not None:
        rounds = -(-reps // len(sets))

        def calls() -> None:
            for tensors in sets * rounds:
                eager(tensors)

        other = launcher.time_graph(calls) / (rounds * len(sets))
    for kernel in registry.cuda_kernels(name):
        for candidate in kernel.candidates(call):
            took = launcher.time(candidate, call, sets, reps)
            print(
                f"{name + label:28} {size:6} {took * 1e6:9.2f} {nbytes / BANDWIDTH / took:7.2f} "
                f"{other / took:7.2f}  {candidate.name}"
            )


def _row_ops(rows: int) -> None:
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
        _measure("sample", rows, make, {}, nbytes, eager, label)
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

        eager = (lambda t: t["logits"].log_softmax(-1).topk(20)) if asked > 0 else None
        _measure("token_logprobs", rows, ask, {"max_top": 20}, nbytes, eager, f" {asked}")


def bench() -> None:
    """Print µs, the share of the floor, and eager PyTorch's time over ours, of every op and size."""
    torch.manual_seed(0)
    print(f"{'op':28} {'size':>6} {'us':>9} {'floor':>7} {'eager':>7}")
    for tokens in TOKENS:
        for name, make, attrs, nbytes, eager in _cases(tokens):
            _measure(name, tokens, make, attrs, nbytes, eager)
    for rows in ROWS:
        _row_ops(rows)


if __name__ == "__main__":
    bench()
