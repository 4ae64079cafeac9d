"""Projections of 8-bit floats on the CPU, over the fp16 panels of linear_cpu.py: fp16 holds every e4m3 number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_cpu import PACKED, in_blocks, invariant_product, prove_invariant
from makeready.kernels.gemm.linear_fp8 import linear_fp8, linear_fp8_block
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(linear_fp8, Contract)
assert isinstance(linear_fp8_block, Contract)


def _applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return attrs["out_dtype"] == "float32"


@kernel(linear_fp8, "packed_fp16", target="cpu", layouts={"weight": PACKED}, applies=_applies)
def linear_fp8_packed(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: Any,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
) -> torch.Tensor:
    """8-bit activations widened to fp32 times packed weights, accumulated in fp32, then the scales."""
    if isinstance(weight, torch.Tensor):
        return linear_fp8.reference(x, x_scale, weight, weight_scale, bias, out_dtype=out_dtype)
    y = weight.multiply(x.float()).mul_(x_scale).mul_(weight_scale)
    return y if bias is None else y.add_(bias)


def _bind_panels(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    x, _, weight, *_ = operands
    prove_invariant(invariant_product(weight), *x.shape)
    return None


@kernel(
    linear_fp8,
    "panels_fp16",
    target="cpu",
    layouts={"weight": PACKED},
    invariant=True,
    ordinary=False,
    applies=_applies,
    bind=_bind_panels,
)
def linear_fp8_panels(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: Any,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
) -> torch.Tensor:
    """:func:`linear_fp8_packed`, the same for a row whatever the others are."""
    y = invariant_product(weight)(x.float()).mul_(x_scale).mul_(weight_scale)
    return y if bias is None else y.add_(bias)


def _bind_blocks(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    x, _, weight, weight_scale, _ = operands
    prove_invariant(_block_product(weight, weight_scale, attrs["block"]), *x.shape)
    return None


def _block_product(
    weight: torch.Tensor, weight_scale: torch.Tensor, block: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    scale = weight_scale.repeat_interleave(block, 0)[: len(weight)].repeat_interleave(block, 1)
    wide = weight.float() * scale
    return lambda x: in_blocks(wide, x)


@kernel(
    linear_fp8_block,
    "blocks",
    target="cpu",
    invariant=True,
    ordinary=False,
    applies=_applies,
    bind=_bind_blocks,
)
def linear_fp8_blocks(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
    block: int,
) -> torch.Tensor:
    """The reference, the same for a row whatever the others are."""
    y = _block_product(weight, weight_scale, block)(x.float() * x_scale.repeat_interleave(block, 1))
    return y if bias is None else y.add_(bias)
