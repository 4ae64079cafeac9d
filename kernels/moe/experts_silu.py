"""The first product of experts with the gate that follows it.

Defined as what they fuse, with the value between rounded to its dtype, so that a plan gives the same numbers with
and without them.

X rows of tokens, M entries (kernels/moe/route.py), E experts, J gate columns and as many up columns, K inputs
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import contract
from makeready.kernels.elementwise import silu_mul
from makeready.kernels.moe.experts import (
    grouped_linear,
    grouped_linear_fp8,
    grouped_linear_fp8_block,
    grouped_linear_int8,
)

_TRAFFIC = {
    "weight": "distinct(E,M)*J*K"
}  # of a router that gives each expert the same chance; others are not read


@contract(
    "x[X,K]:A weight[E,J,K]:W order[M]:int32 start[E+1]:int32 -> y[M,J//2]:out_dtype|A",
    flops="2*M*J*K",
    traffic=_TRAFFIC,
    rate="weight",
    fuses=("grouped_linear", "silu_mul"),
)
def grouped_silu_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """``silu_mul`` of :func:`~.experts.grouped_linear`."""
    return silu_mul(grouped_linear(x, weight, order, start, top_k=top_k, out_dtype=out_dtype))


@contract(
    "x[X,K]:float8_e4m3fn x_scale[X,1]:float32 weight[E,J,K]:float8_e4m3fn weight_scale[E,J]:float32 "
    "order[M]:int32 start[E+1]:int32 -> y[M,J//2]:out_dtype|bfloat16",
    flops="2*M*J*K",
    traffic=_TRAFFIC,
    rate="weight",
    fuses=("grouped_linear_fp8", "silu_mul"),
)
def grouped_silu_mul_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    out_dtype: str,
) -> torch.Tensor:
    """``silu_mul`` of :func:`~.experts.grouped_linear_fp8`."""
    y = grouped_linear_fp8(x, x_scale, weight, weight_scale, order, start, top_k=top_k, out_dtype=out_dtype)
    return silu_mul(y)


@contract(
    "x[X,K]:int8 x_scale[X,1]:float32 weight[E,J,K]:int8 weight_scale[E,J]:float32 "
    "order[M]:int32 start[E+1]:int32 -> y[M,J//2]:out_dtype|bfloat16",
    flops="2*M*J*K",
    traffic=_TRAFFIC,
    rate="weight",
    fuses=("grouped_linear_int8", "silu_mul"),
)
def grouped_silu_mul_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    out_dtype: str,
) -> torch.Tensor:
    """``silu_mul`` of :func:`~.experts.grouped_linear_int8`."""
    y = grouped_linear_int8(x, x_scale, weight, weight_scale, order, start, top_k=top_k, out_dtype=out_dtype)
    return silu_mul(y)


@contract(
    "x[X,K]:float8_e4m3fn x_scale[X,K//block]:float32 "
    "weight[E,J,K]:float8_e4m3fn weight_scale[E,(J+block-1)//block,K//block]:float32 "
    "order[M]:int32 start[E+1]:int32 -> y[M,J//2]:out_dtype|bfloat16",
    flops="2*M*J*K",
    traffic=_TRAFFIC,
    rate="weight",
    fuses=("grouped_linear_fp8_block", "silu_mul"),
)
def grouped_silu_mul_fp8_block(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    out_dtype: str,
    block: int,
) -> torch.Tensor:
    """``silu_mul`` of :func:`~.experts.grouped_linear_fp8_block`."""
    scales = (x_scale, weight, weight_scale)
    y = grouped_linear_fp8_block(x, *scales, order, start, top_k=top_k, out_dtype=out_dtype, block=block)
    return silu_mul(y)
