"""Element-by-element ops on the CPU: compiled, or written where the result belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels import native
from makeready.kernels.contract import Contract
from makeready.kernels.elementwise import (
    add,
    clamped_swiglu,
    gather_last,
    gelu_tanh_mul,
    multiply,
    pad_columns,
    scale,
    silu_mul,
)
from makeready.kernels.registry import Bind, Operands, by_rows, kernel
from makeready.kernels.spec import TensorSpec

for op in (add, multiply, scale, silu_mul, gelu_tanh_mul, clamped_swiglu):
    assert isinstance(op, Contract)


def _float32(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return specs["gate_up"].dtype == "float32"


def _native(op: str) -> Bind:
    """Binds the compiled op of this name."""

    def bind(
        operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
    ) -> Callable[[], None] | None:
        (x,), (y,) = operands, results
        long = len(x) > native.MANY_TOKENS
        return native.prepare(op, x, x.stride(0), y, y.stride(0), *y.shape, long=long)

    return bind


def _gated(op: Contract, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The implementations of a gate: ``run`` and the compiled op, and these for every row by itself."""
    bind = _native(op.name)
    kernel(op, "fused", target="cpu", applies=_float32, bind=bind)(run)
    rows = kernel(op, "rows", target="cpu", invariant=True, ordinary=False, applies=_float32, bind=bind)
    rows(by_rows(op, run))


def silu_mul_cpu(gate_up: torch.Tensor) -> torch.Tensor:
    """The reference in place of its own first product."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def gelu_tanh_mul_cpu(gate_up: torch.Tensor) -> torch.Tensor:
    """The reference in place of its own products."""
    gate, up = gate_up.chunk(2, dim=-1)
    cube = (gate * gate).mul_(gate)
    return torch.add(gate, cube, alpha=0.044715).mul_(1.5957691216057308).sigmoid_().mul_(gate).mul_(up)


def clamped_swiglu_cpu(gate_up: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """The reference in place of its own products."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (gate * alpha).sigmoid_().mul_(gate).mul_(up.clamp(-limit, limit).add_(1))


_gated(silu_mul, silu_mul_cpu)
_gated(gelu_tanh_mul, gelu_tanh_mul_cpu)
kernel(clamped_swiglu, "fused", target="cpu", applies=_float32)(clamped_swiglu_cpu)
kernel(clamped_swiglu, "rows", target="cpu", invariant=True, ordinary=False, applies=_float32)(
    by_rows(clamped_swiglu, clamped_swiglu_cpu)
)

# One rounding an element, wherever it stands.
kernel(add, "rows", target="cpu", invariant=True, ordinary=False)(add.reference)
kernel(multiply, "rows", target="cpu", invariant=True, ordinary=False)(multiply.reference)
kernel(scale, "rows", target="cpu", invariant=True, ordinary=False)(scale.reference)
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
