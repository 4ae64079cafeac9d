"""Products with experts' weights in MXFP4 or NVFP4 on the CPU: they stay packed, as in experts_int_cpu.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.elementwise import clamped_swiglu, silu_mul
from makeready.kernels.elementwise_cpu import clamped_swiglu_cpu, silu_mul_cpu
from makeready.kernels.gemm.linear_cpu import prove_invariant
from makeready.kernels.gemm.linear_int_cpu import IntMatrix
from makeready.kernels.moe.experts import add_bias
from makeready.kernels.moe.experts_cpu import by_expert
from makeready.kernels.moe.experts_mx import (
    grouped_clamped_swiglu_mx,
    grouped_linear_mx,
    grouped_silu_mul_mx,
)
from makeready.kernels.mx import BITS, BLOCK
from makeready.kernels.registry import Operands, by_rows, kernel
from makeready.kernels.spec import TensorSpec

for op in (grouped_linear_mx, grouped_clamped_swiglu_mx, grouped_silu_mul_mx, clamped_swiglu, silu_mul):
    assert isinstance(op, Contract)

Product = Callable[[IntMatrix], Callable[[torch.Tensor], torch.Tensor]]


def _applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return specs["x"].dtype == "float32" and attrs["out_dtype"] in ("", "float32")


def _expert(operands: Operands, expert: int) -> IntMatrix:
    x, weight, scale, whole, *_ = operands
    own = None if whole is None else whole[expert]
    return IntMatrix(weight[expert], scale[expert], None, BITS, BLOCK, x.shape[1], own)


def _linear(product: Product, gate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_global_scale: torch.Tensor | None,
        order: torch.Tensor,
        start: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        top_k: int,
        out_dtype: str,
        **of_gate: float,
    ) -> torch.Tensor:
        def of(expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return product(_expert((x, weight, weight_scale, weight_global_scale), expert))

        y = by_expert(x, order, start, top_k, weight.shape[1], of)
        return gate(add_bias(y, bias, start), **of_gate)

    return run


def _bind(operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]) -> None:
    """Binds nothing, but checks that this machine's product is invariant where it is PyTorch's."""
    first = _expert(operands, 0)
    if not first.compiled:
        prove_invariant(first.multiply_alike, len(results[0]), first.inputs)


for op, gate, gate_alike in (
    (grouped_linear_mx, lambda y: y, lambda y: y),
    (grouped_silu_mul_mx, silu_mul_cpu, by_rows(silu_mul, silu_mul_cpu)),
    (grouped_clamped_swiglu_mx, clamped_swiglu_cpu, by_rows(clamped_swiglu, clamped_swiglu_cpu)),
):
    kernel(op, "packed", target="cpu", applies=_applies)(_linear(lambda m: m.multiply, gate))
    kernel(op, "packed_rows", target="cpu", invariant=True, ordinary=False, applies=_applies, bind=_bind)(
        _linear(lambda m: m.multiply_alike, gate_alike)
    )
