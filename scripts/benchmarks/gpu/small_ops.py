"""Small ops at Qwen3-8B's shapes on the present GPU, beside their floors and PyTorch's eager ops.

The floor is every byte moved once at the device-copy rate; operands rotate, so that they come from memory.
Eager PyTorch runs from a CUDA graph, so that its launches cost what ours do. Each op is held to its reference
first, at CHECKED tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu import launcher, ops
from benchmarks.gpu.ops import Case, Operands, Tensors
from benchmarks.gpu.shapes import HEAD_DIM, HEADS, HIDDEN, INNER, VOCABULARY

for module in ("norm", "elementwise", "embedding", "rope"):
    importlib.import_module(f"makeready.kernels.{module}_triton")

TOKENS = (1, 16, 64, 256, 8192)
CHECKED = 16


def cases(device: str, sizes: Iterable[int]) -> Iterator[Case]:
    """Every op at these numbers of tokens."""
    for tokens in sizes:
        yield from _cases(tokens, device)


def _cases(tokens: int, device: str) -> list[Case]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    def ints(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, device=device).int()

    hidden, rotary = 2 * tokens * HIDDEN, 4 * tokens * HEAD_DIM
    weight, rows = normal(HIDDEN), torch.rand(4096, HEAD_DIM, device=device)
    embeddings = normal(VOCABULARY, HIDDEN)
    eps = {"eps": 1e-6}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (HIDDEN,), weight, eps["eps"])

    def rotate(t: Operands) -> torch.Tensor:
        cos, sin = t["rows"].unsqueeze(1).chunk(2, -1)
        first, second = t["x"].view(tokens, HEADS, HEAD_DIM).chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).bfloat16()

    def silu_mul(t: Operands) -> torch.Tensor:
        gate, up = t["gate_up"].chunk(2, -1)
        return functional.silu(gate) * up

    def case(
        op: str, make: Callable[[], Tensors], attrs: dict[str, Any], nbytes: float, eager: ops.Eager
    ) -> Case:
        return Case(op, "", tokens, make, attrs, nbytes, eager)

    return [
        case("rms_norm", lambda: {"x": normal(tokens, HIDDEN), "weight": weight}, eps, 2 * hidden,
             lambda t: norm(t["x"])),
        case("add_rms_norm",
             lambda: {"x": normal(tokens, HIDDEN), "residual": normal(tokens, HIDDEN), "weight": weight},
             eps, 4 * hidden, lambda t: norm(t["x"] + t["residual"])),
        case("silu_mul", lambda: {"gate_up": normal(tokens, 2 * INNER)}, {}, 6 * tokens * INNER, silu_mul),
        case("embedding", lambda: {"ids": ints(VOCABULARY, tokens), "weight": embeddings}, {}, 2 * hidden,
             lambda t: functional.embedding(t["ids"], t["weight"])),
        case("rope_rows", lambda: {"positions": ints(4096, tokens), "table": rows}, {}, 2 * rotary,
             lambda t: t["table"][t["positions"]]),
        case("rope", lambda: {"x": normal(tokens, HIDDEN), "rows": torch.rand(tokens, HEAD_DIM, device=device)},
             {"heads": HEADS, "head_dim": HEAD_DIM}, 2 * hidden + rotary, rotate),
    ]  # fmt: skip


def measure(note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of every way of every op and size, with its floor and eager PyTorch's time."""
    torch.manual_seed(0)
    launcher.prepare(ops.calls(cases("meta", TOKENS)))
    for case in cases("cuda", [CHECKED]):
        launcher.check(case.contract, ops.candidates, case.make(), case.attrs)
    return ops.measure(cases("cuda", TOKENS), note)
