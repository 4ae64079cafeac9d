"""The first product of experts with its gate on the CPU: the kernels of experts_cpu.py, and the gate behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.elementwise import clamped_swiglu, silu_mul
from makeready.kernels.elementwise_cpu import clamped_swiglu_cpu, silu_mul_cpu
from makeready.kernels.moe import experts_cpu
from makeready.kernels.moe.experts import (
    grouped_linear,
    grouped_linear_fp8,
    grouped_linear_fp8_block,
    grouped_linear_int8,
)
from makeready.kernels.moe.experts_silu import (
    grouped_silu_mul,
    grouped_silu_mul_fp8,
    grouped_silu_mul_fp8_block,
    grouped_silu_mul_int8,
)
from makeready.kernels.moe.experts_swiglu import grouped_clamped_swiglu
from makeready.kernels.registry import REFERENCE, Kernel, by_rows, kernel, kernels

assert experts_cpu  # whose kernels are registered by now
assert isinstance(silu_mul, Contract)
assert isinstance(clamped_swiglu, Contract)


def _gated(product: Kernel, op: Contract, fused: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    gate = by_rows(op, fused) if product.invariant else fused

    def run(*operands: Any, **attrs: Any) -> torch.Tensor:
        of_gate = {name: attrs.pop(name) for name in op.attrs}
        return gate(product.run(*operands, **attrs), **of_gate)

    return run


for plain, fused, gate, gate_cpu in (
    (grouped_linear, grouped_silu_mul, silu_mul, silu_mul_cpu),
    (grouped_linear_fp8, grouped_silu_mul_fp8, silu_mul, silu_mul_cpu),
    (grouped_linear_fp8_block, grouped_silu_mul_fp8_block, silu_mul, silu_mul_cpu),
    (grouped_linear_int8, grouped_silu_mul_int8, silu_mul, silu_mul_cpu),
    (grouped_linear, grouped_clamped_swiglu, clamped_swiglu, clamped_swiglu_cpu),
):
    assert isinstance(plain, Contract)
    assert isinstance(fused, Contract)
    for made in kernels(plain.name, "cpu"):
        if made.name != REFERENCE:
            kernel(
                fused,
                made.name,
                target="cpu",
                layouts=made.layouts,
                invariant=made.invariant,
                ordinary=made.ordinary,
                applies=made.applies,
                bind=made.bind,
            )(_gated(made, gate, gate_cpu))
