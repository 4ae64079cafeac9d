"""What makes a row of 8-bit floats, and the projection of it, as one op, for steps of few rows.

# T tokens, K inputs, N outputs
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.gemm.linear_fp8 import linear_fp8
from makeready.kernels.quantize import (
    add_rms_norm_quantize_fp8,
    quantize_fp8,
    rms_norm_quantize_fp8,
    silu_mul_quantize_fp8,
)

# A few values in a hundred round to the other neighbour, an eighth away; see kernels/quantize.py.
_TOLERANCE = Tolerance(float32=1e-2, bfloat16=2e-2)
_WEIGHTS = "weight[N,K]:float8_e4m3fn weight_scale[N]:float32 bias?[N]:B"


@contract(
    f"x[T,K]:A {_WEIGHTS} -> y[T,N]:out_dtype|bfloat16",
    rowwise="T",
    flops="2*T*N*K+3*T*K",
    rate="weight",
    tolerance=_TOLERANCE,
    chains=("quantize_fp8", "linear_fp8"),
)
def quantize_fp8_linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group: int,
    out_dtype: str,
) -> torch.Tensor:
    """``linear_fp8`` of what ``quantize_fp8`` makes of ``x``."""
    return linear_fp8(*quantize_fp8(x, group=group), weight, weight_scale, bias, out_dtype=out_dtype)


@contract(
    f"x[T,K]:A gain[K]:G {_WEIGHTS} -> y[T,N]:out_dtype|bfloat16",
    rowwise="T",
    flops="2*T*N*K+7*T*K",
    rate="weight",
    tolerance=_TOLERANCE,
    chains=("rms_norm_quantize_fp8", "linear_fp8"),
)
def rms_norm_quantize_fp8_linear_fp8(
    x: torch.Tensor,
    gain: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    group: int,
    out_dtype: str,
    offset: float = 0.0,
) -> torch.Tensor:
    """``linear_fp8`` of ``rms_norm_quantize_fp8``."""
    q, scale = rms_norm_quantize_fp8(x, gain, eps=eps, group=group, offset=offset)
    return linear_fp8(q, scale, weight, weight_scale, bias, out_dtype=out_dtype)


@contract(
    f"x[T,K]:A residual[T,K]:A gain[K]:G {_WEIGHTS} -> y[T,N]:out_dtype|bfloat16 residual_out[T,K]:A",
    rowwise="T",
    flops="2*T*N*K+8*T*K",
    rate="weight",
    tolerance=_TOLERANCE,
    chains=("add_rms_norm_quantize_fp8", "linear_fp8"),
)
def add_rms_norm_quantize_fp8_linear_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    gain: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    group: int,
    out_dtype: str,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``linear_fp8`` of ``add_rms_norm_quantize_fp8``, and the sum."""
    q, scale, total = add_rms_norm_quantize_fp8(x, residual, gain, eps=eps, group=group, offset=offset)
    return linear_fp8(q, scale, weight, weight_scale, bias, out_dtype=out_dtype), total


@contract(
    f"gate_up[T,2*K]:A {_WEIGHTS} -> y[T,N]:out_dtype|bfloat16",
    rowwise="T",
    flops="2*T*N*K+8*T*K",
    rate="weight",
    tolerance=_TOLERANCE,
    chains=("silu_mul_quantize_fp8", "linear_fp8"),
)
def silu_mul_quantize_fp8_linear_fp8(
    gate_up: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group: int,
    out_dtype: str,
) -> torch.Tensor:
    """``linear_fp8`` of ``silu_mul_quantize_fp8``."""
    q, scale = silu_mul_quantize_fp8(gate_up, group=group)
    return linear_fp8(q, scale, weight, weight_scale, bias, out_dtype=out_dtype)
