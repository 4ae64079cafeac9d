"""Element-by-element ops on the CPU: compiled, or written where the result belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels import native
from makeready.kernels.contract import Contract
from makeready.kernels.elementwise import add, gather_last, multiply, pad_columns, silu_mul
from makeready.kernels.registry import Operands, by_rows, kernel
from makeready.kernels.spec import TensorSpec

for op in (add, multiply, silu_mul):
    assert isinstance(op, Contract)


def _float32(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return specs["gate_up"].dtype == "float32"


def _bind_silu_mul(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    few = len(operands[0]) <= native.MOST_TOKENS
    return _native_silu_mul(operands, results, attrs) if few else None


def _native_silu_mul(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (x,), (y,) = operands, results
    return native.prepare("silu_mul", x, x.stride(0), y, y.stride(0), *y.shape)


@kernel(silu_mul, "fused", target="cpu", applies=_float32, bind=_bind_silu_mul)
def silu_mul_cpu(gate_up: torch.Tensor) -> torch.Tensor:
    """The reference in place of its own first product."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


_BY_ROWS = by_rows(silu_mul, silu_mul_cpu)


@kernel(
    silu_mul, "rows", target="cpu", invariant=True, ordinary=False, applies=_float32, bind=_native_silu_mul
)
def silu_mul_rows(gate_up: torch.Tensor) -> torch.Tensor:
    """:func:`silu_mul_cpu` of every row by itself, compiled for any number of them."""
    return _BY_ROWS(gate_up)


# One rounding an element, wherever it stands.
kernel(add, "rows", target="cpu", invariant=True, ordinary=False)(add.reference)
kernel(multiply, "rows", target="cpu", invariant=True, ordinary=False)(multiply.reference)
kernel(pad_columns, "rows", target="cpu", invariant=True)(pad_columns.reference)


def _bind_gather_last(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None]:
    (x, query_start, query_len), (y,) = operands, results

    def call() -> None:
        torch.index_select(x, 0, (query_start + query_len).sub_(1).clamp_min_(0), out=y)

    return call


@kernel(gather_last, "in_place", target="cpu", invariant=True, bind=_bind_gather_last)
def gather_last_cpu(x: torch.Tensor, query_start: torch.Tensor, query_len: torch.Tensor) -> torch.Tensor:
    """The reference."""
    return gather_last.reference(x, query_start, query_len)
