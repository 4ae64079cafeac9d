"""Products with experts' weights of 4 or 8 bits on the CPU: those of gemm/linear_int_cpu.py for experts in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.elementwise import silu_mul
from makeready.kernels.elementwise_cpu import silu_mul_cpu
from makeready.kernels.gemm.linear_cpu import prove_invariant
from makeready.kernels.gemm.linear_int_cpu import IntMatrix
from makeready.kernels.moe.experts_cpu import by_expert
from makeready.kernels.moe.experts_int import grouped_linear_int, grouped_silu_mul_int
from makeready.kernels.registry import Operands, by_rows, kernel
from makeready.kernels.spec import TensorSpec

for op in (grouped_linear_int, grouped_silu_mul_int, silu_mul):
    assert isinstance(op, Contract)

Product = Callable[[IntMatrix], Callable[[torch.Tensor], torch.Tensor]]


def _applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return specs["x"].dtype == "float32" and attrs["out_dtype"] in ("", "float32")


def _expert(operands: Operands, attrs: Mapping[str, Any], expert: int) -> IntMatrix:
    x, weight, scale, zero, *_ = operands
    own = None if zero is None else zero[expert]
    return IntMatrix(weight[expert], scale[expert], own, attrs["bits"], attrs["group"], x.shape[1])


def _linear(product: Product, gate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_zero: torch.Tensor | None,
        order: torch.Tensor,
        start: torch.Tensor,
        *,
        top_k: int,
        **attrs: Any,
    ) -> torch.Tensor:
        operands = (x, weight, weight_scale, weight_zero)

        def of(expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return product(_expert(operands, attrs, expert))

        return gate(by_expert(x, order, start, top_k, weight.shape[1], of))

    return run


def _bind(operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]) -> None:
    """Binds nothing, but checks that this machine's product is invariant where it is PyTorch's."""
    first = _expert(operands, attrs, 0)
    if not first.compiled:
        prove_invariant(first.multiply_alike, len(results[0]), first.inputs)


for op, gate, gate_alike in (
    (grouped_linear_int, lambda y: y, lambda y: y),
    (grouped_silu_mul_int, silu_mul_cpu, by_rows(silu_mul, silu_mul_cpu)),
):
    kernel(op, "packed", target="cpu", applies=_applies)(_linear(lambda m: m.multiply, gate))
    kernel(op, "packed_rows", target="cpu", invariant=True, ordinary=False, applies=_applies, bind=_bind)(
        _linear(lambda m: m.multiply_alike, gate_alike)
    )
