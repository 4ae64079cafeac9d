"""Projections with weights in MXFP4 or NVFP4 on the CPU: they stay packed, as in linear_int_cpu.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_int_cpu import IntMatrix, bind_alike, bind_few, floats
from makeready.kernels.gemm.linear_mx import linear_mx
from makeready.kernels.mx import BITS, BLOCK
from makeready.kernels.registry import Operands, kernel

assert isinstance(linear_mx, Contract)


def _matrix(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor | None
) -> IntMatrix:
    return IntMatrix(weight, scale, None, BITS, BLOCK, x.shape[1], global_scale)


def _bind(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    x, *weights, bias = operands
    return bind_few(_matrix(x, *weights), x, results[0], bias)


@kernel(linear_mx, "packed", target="cpu", applies=floats, bind=_bind)
def linear_mx_packed(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
) -> torch.Tensor:
    """fp32 activations times packed weights, accumulated in fp32."""
    y = _matrix(x, weight, weight_scale, weight_global_scale).multiply(x)
    return y if bias is None else y.add_(bias)


def _bind_alike(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    x, *weights, bias = operands
    return bind_alike(_matrix(x, *weights), x, results[0], bias)


@kernel(
    linear_mx, "packed_rows", target="cpu", invariant=True, ordinary=False, applies=floats, bind=_bind_alike
)
def linear_mx_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
) -> torch.Tensor:
    """:func:`linear_mx_packed`, the same for a row whatever the others are."""
    y = _matrix(x, weight, weight_scale, weight_global_scale).multiply_alike(x)
    return y if bias is None else y.add_(bias)
