"""The weighted sum of a token's experts with the residual addition and norm behind it: a launch less in every layer.

Defined as what they fuse, with the values between rounded to their dtype, so that a plan gives the same numbers with
and without them.

T tokens, M entries, k experts of a token, C features
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.moe.route import combine
from makeready.kernels.norm import add_rms_norm
from makeready.kernels.quantize import quantize_fp8
from makeready.kernels.quantize_int8 import INT8_FUSED, quantize_int8


@contract(
    "x[M,C]:A place[T,k]:int32 share[T,k]:float32 residual[T,C]:A weight[C]:W -> y[T,C]:A residual_out[T,C]:A",
    rowwise="T",
    flops="2*T*k*C+5*T*C",
    fuses=("combine", "add_rms_norm"),
)
def combine_add_rms_norm(
    x: torch.Tensor,
    place: torch.Tensor,
    share: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``add_rms_norm`` of :func:`~.route.combine`."""
    return add_rms_norm(combine(x, place, share), residual, weight, eps=eps, offset=offset)


@contract(
    "x[M,C]:A place[T,k]:int32 share[T,k]:float32 residual[T,C]:A weight[C]:W -> "
    "q[T,C]:float8_e4m3fn scale[T,C//group]:float32 residual_out[T,C]:A",
    rowwise="T",
    flops="2*T*k*C+8*T*C",
    tolerance=Tolerance(float32=1e-2, float8_e4m3fn=6e-2),  # as other fused ones, see kernels/quantize.py
    fuses=("combine_add_rms_norm", "quantize_fp8"),
)
def combine_add_rms_norm_quantize_fp8(
    x: torch.Tensor,
    place: torch.Tensor,
    share: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group: int,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``quantize_fp8`` of :func:`combine_add_rms_norm`'s norm, and its sum."""
    y, total = combine_add_rms_norm(x, place, share, residual, weight, eps=eps, offset=offset)
    return *quantize_fp8(y, group=group), total


@contract(
    "x[M,C]:A place[T,k]:int32 share[T,k]:float32 residual[T,C]:A weight[C]:W -> "
    "q[T,C]:int8 scale[T,C//group]:float32 residual_out[T,C]:A",
    rowwise="T",
    flops="2*T*k*C+8*T*C",
    tolerance=INT8_FUSED,
    fuses=("combine_add_rms_norm", "quantize_int8"),
)
def combine_add_rms_norm_quantize_int8(
    x: torch.Tensor,
    place: torch.Tensor,
    share: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group: int,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``quantize_int8`` of :func:`combine_add_rms_norm`'s norm, and its sum."""
    y, total = combine_add_rms_norm(x, place, share, residual, weight, eps=eps, offset=offset)
    return *quantize_int8(y, group=group), total
