"""A norm, the projection of it, and the gate over that, as one op: what a step of few rows may run in one launch.

# T tokens, K inputs, N outputs of the projection
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.elementwise import silu_mul
from makeready.kernels.gemm.linear import linear
from makeready.kernels.norm import add_rms_norm, rms_norm

# A norm that is rounded to 16 bits the other way moves wide results, too.
ROUNDED = Tolerance(float32=2e-3)


@contract(
    "x[T,K]:A gain[K]:G weight[N,K]:W bias?[N]:B -> y[T,N]:out_dtype|A",
    rowwise="T",
    flops="2*T*N*K+4*T*K",
    rate="weight",
    chains=("rms_norm", "linear"),
    tolerance=ROUNDED,
)
def rms_norm_linear(
    x: torch.Tensor,
    gain: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    out_dtype: str = "",
) -> torch.Tensor:
    """``linear(rms_norm(x, gain), weight, bias)``."""
    return linear(rms_norm(x, gain, eps=eps, offset=offset), weight, bias, out_dtype=out_dtype)


@contract(
    "x[T,K]:A residual[T,K]:A gain[K]:G weight[N,K]:W bias?[N]:B -> y[T,N]:out_dtype|A residual_out[T,K]:A",
    rowwise="T",
    flops="2*T*N*K+5*T*K",
    rate="weight",
    chains=("add_rms_norm", "linear"),
    tolerance=ROUNDED,
)
def add_rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    gain: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    out_dtype: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``linear`` of ``add_rms_norm``'s norm, and its sum."""
    y, total = add_rms_norm(x, residual, gain, eps=eps, offset=offset)
    return linear(y, weight, bias, out_dtype=out_dtype), total


@contract(
    "x[T,K]:A residual[T,K]:A gain[K]:G weight[N,K]:W bias?[N]:B -> y[T,N//2]:out_dtype|A residual_out[T,K]:A",
    rowwise="T",
    flops="2*T*N*K+5*T*K+5*T*N/2",
    rate="weight",
    chains=("add_rms_norm", "linear", "silu_mul"),
    tolerance=ROUNDED,
)
def add_rms_norm_linear_silu_mul(
    x: torch.Tensor,
    residual: torch.Tensor,
    gain: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    out_dtype: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``silu_mul`` of :func:`add_rms_norm_linear`, and its sum."""
    y, total = add_rms_norm(x, residual, gain, eps=eps, offset=offset)
    return silu_mul(linear(y, weight, bias, out_dtype=out_dtype)), total
