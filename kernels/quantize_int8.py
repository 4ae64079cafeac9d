"""Activations and weights to 8-bit integers with scales, as kernels/quantize.py does to floats: ``x ≈ q * scale``.

Symmetric: the largest magnitude that shares a scale becomes 127, and -128 is never made. A row with NaN or an
infinite number has an infinite scale, so that what is multiplied with it is no number that looks right.
"""

from __future__ import annotations

import torch

from makeready.kernels import elementwise, norm
from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.numeric import to_dtype, widen
from makeready.kernels.quantize import LEAST_SCALE

INT8_MAX = 127.0

# As those of kernels/quantize.py; neighbours are a 127th of the largest apart.
_TOLERANCE = Tolerance(float32=1e-5, int8=1e-2)
INT8_FUSED = Tolerance(float32=1e-2, int8=2e-2)


def to_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale`` rounded to the nearest integer, ties to even, saturated at 127; NaN becomes 0."""
    return (widen(x) / scale).nan_to_num(0.0).clamp(-INT8_MAX, INT8_MAX).round().to(torch.int8)


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude along the last axis; infinite where one of the numbers is not finite."""
    return x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(-1)


@contract(
    "x[T,C]:A -> q[T,C]:int8 scale[T,C//group]:float32",
    rowwise="T",
    flops="3*T*C",
    tolerance=_TOLERANCE,
)
def quantize_int8(x: torch.Tensor, *, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for every token and ``group`` neighbouring columns; ``group`` divides C.

    ``scale = max(|x|) / 127`` over the group and ``q = x / scale``.
    """
    grouped = widen(x).unflatten(-1, (-1, group))
    scale = (_largest(grouped) / INT8_MAX).clamp_min(LEAST_SCALE)
    return to_int8(grouped, scale[..., None]).flatten(-2), scale.float()


@contract(
    "x[T,C]:A scale[1]:float32 -> q[T,C]:int8 row_scale[T,1]:float32",
    rowwise="T",
    flops="2*T*C",
    tolerance=_TOLERANCE,
)
def quantize_int8_static(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for everything, known beforehand; ``row_scale`` repeats it for every token with finite numbers.

    What lies beyond ``127 * scale`` saturates.
    """
    finite = _largest(widen(x)).isfinite()[:, None]
    return to_int8(x, widen(scale)), torch.where(finite, scale.float(), torch.inf)


@contract("q[N,C]:int8 scale[N]:float32 -> x[N,C]:out_dtype|bfloat16", flops="N*C")
def dequantize_int8(q: torch.Tensor, scale: torch.Tensor, *, out_dtype: str) -> torch.Tensor:
    """``q * scale`` with one scale a row."""
    wide = widen(scale).unsqueeze(1)
    return to_dtype(q.to(wide.dtype) * wide, out_dtype, like=wide)


@contract(
    "x[T,C]:A weight[C]:W -> q[T,C]:int8 scale[T,C//group]:float32",
    rowwise="T",
    flops="7*T*C",
    tolerance=INT8_FUSED,
    fuses=("rms_norm", "quantize_int8"),
)
def rms_norm_quantize_int8(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, group: int, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_int8` of ``rms_norm(x, weight)``."""
    return quantize_int8(norm.rms_norm(x, weight, eps=eps, offset=offset), group=group)


@contract(
    "x[T,C]:A residual[T,C]:A weight[C]:W -> q[T,C]:int8 scale[T,C//group]:float32 residual_out[T,C]:A",
    rowwise="T",
    flops="8*T*C",
    tolerance=INT8_FUSED,
    fuses=("add_rms_norm", "quantize_int8"),
)
def add_rms_norm_quantize_int8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group: int,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`quantize_int8` of ``add_rms_norm``'s norm, and its sum."""
    y, total = norm.add_rms_norm(x, residual, weight, eps=eps, offset=offset)
    return *quantize_int8(y, group=group), total


@contract(
    "x[T,C]:A residual[T,C]:A weight[C]:W -> "
    "q[T,C]:int8 scale[T,C//group]:float32 y[T,C]:A residual_out[T,C]:A",
    rowwise="T",
    flops="8*T*C",
    tolerance=INT8_FUSED,
    fuses=("add_rms_norm", "quantize_int8"),
)
def add_rms_norm_and_quantize_int8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group: int,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``add_rms_norm``, and :func:`quantize_int8` of its norm: for those who read both, as router and experts do."""
    y, total = norm.add_rms_norm(x, residual, weight, eps=eps, offset=offset)
    return *quantize_int8(y, group=group), y, total


@contract(
    "gate_up[T,J]:A -> q[T,J//2]:int8 scale[T,J//2//group]:float32",
    rowwise="T",
    flops="4*T*J",
    tolerance=INT8_FUSED,
    fuses=("silu_mul", "quantize_int8"),
)
def silu_mul_quantize_int8(gate_up: torch.Tensor, *, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_int8` of ``silu_mul(gate_up)``."""
    return quantize_int8(elementwise.silu_mul(gate_up), group=group)
