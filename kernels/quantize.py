"""Activations and weights to 8-bit floats with scales: ``x ≈ q * scale``.

The format is e4m3 with 4 exponent and 3 mantissa bits, no infinity and 448 as its largest number
(Micikevicius et al. 2022, arXiv:2209.05433). A scale is chosen so that the largest magnitude that shares it
becomes 448. The fused ops are defined as what they fuse, with the value between rounded to the activations'
dtype, so that a plan gives the same numbers with and without them.
"""

from __future__ import annotations

import torch

from makeready.kernels import elementwise, norm
from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.numeric import to_dtype, widen

FP8_MAX = 448.0
LEAST_SCALE = 1e-12  # zeros stay zeros, and nothing is divided by zero

# A product of a different order of rounding moves a value across the middle between two neighbours, which
# lie a sixteenth to an eighth apart; with a 16-bit value in between a few in a hundred, else next to none.
_TOLERANCE = Tolerance(float32=1e-5, float8_e4m3fn=2e-2)
_FUSED_TOLERANCE = Tolerance(float32=1e-2, float8_e4m3fn=6e-2)


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x / scale`` rounded to the nearest e4m3 number, ties to even, saturated at 448; NaN stays NaN."""
    return (widen(x) / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _scale_of(largest: torch.Tensor) -> torch.Tensor:
    return (largest / FP8_MAX).clamp_min(LEAST_SCALE)


@contract(
    "x[T,C]:A -> q[T,C]:float8_e4m3fn scale[T,C//group]:float32",
    rowwise="T",
    flops="3*T*C",
    tolerance=_TOLERANCE,
)
def quantize_fp8(x: torch.Tensor, *, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for every token and ``group`` neighbouring columns; ``group`` divides C.

    ``scale = max(|x|) / 448`` over the group and ``q = x / scale``.
    """
    grouped = widen(x).unflatten(-1, (-1, group))
    scale = _scale_of(grouped.abs().amax(-1))
    return to_fp8(grouped, scale[..., None]).flatten(-2), scale.float()


@contract(
    "x[T,C]:A scale[1]:float32 -> q[T,C]:float8_e4m3fn row_scale[T,1]:float32",
    rowwise="T",
    flops="2*T*C",
    tolerance=_TOLERANCE,
)
def quantize_fp8_static(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for everything, known beforehand; ``row_scale`` repeats it for every token.

    What lies beyond ``448 * scale`` saturates.
    """
    return to_fp8(x, widen(scale)), scale.float().expand(len(x), 1).clone()


@contract(
    "x[N,C]:A -> q[N,C]:float8_e4m3fn scale[(N+block-1)//block,(C+block-1)//block]:float32",
    flops="3*N*C",
    tolerance=_TOLERANCE,
)
def quantize_fp8_block(x: torch.Tensor, *, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for every square of ``block`` rows and columns, as DeepSeek-V3 stores weights
    (arXiv:2412.19437); the last ones may be smaller.
    """
    rows, columns = x.shape
    padded = torch.nn.functional.pad(widen(x), (0, -columns % block, 0, -rows % block))
    squares = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = _scale_of(squares.abs().amax((1, 3)))
    q = to_fp8(squares, scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return q[:rows, :columns].contiguous(), scale.float()


@contract("q[N,C]:float8_e4m3fn scale[N]:float32 -> x[N,C]:out_dtype|bfloat16", flops="N*C")
def dequantize_fp8(q: torch.Tensor, scale: torch.Tensor, *, out_dtype: str) -> torch.Tensor:
    """``q * scale`` with one scale a row."""
    return to_dtype(widen(q) * widen(scale).unsqueeze(1), out_dtype, like=q)


@contract(
    "q[N,C]:float8_e4m3fn scale[(N+block-1)//block,(C+block-1)//block]:float32 -> x[N,C]:out_dtype|bfloat16",
    flops="N*C",
)
def dequantize_fp8_block(q: torch.Tensor, scale: torch.Tensor, *, block: int, out_dtype: str) -> torch.Tensor:
    """``q * scale`` with one scale for every square of ``block`` rows and columns; the last ones may be smaller."""
    rows, columns = q.shape
    wide = widen(scale).repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return to_dtype(widen(q) * wide, out_dtype, like=q)


@contract(
    "x[T,C]:A weight[C]:W -> q[T,C]:float8_e4m3fn scale[T,C//group]:float32",
    rowwise="T",
    flops="7*T*C",
    tolerance=_FUSED_TOLERANCE,
    fuses=("rms_norm", "quantize_fp8"),
)
def rms_norm_quantize_fp8(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, group: int, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_fp8` of ``rms_norm(x, weight)``."""
    return quantize_fp8(norm.rms_norm(x, weight, eps=eps, offset=offset), group=group)


@contract(
    "x[T,C]:A residual[T,C]:A weight[C]:W -> "
    "q[T,C]:float8_e4m3fn scale[T,C//group]:float32 residual_out[T,C]:A",
    rowwise="T",
    flops="8*T*C",
    tolerance=_FUSED_TOLERANCE,
    fuses=("add_rms_norm", "quantize_fp8"),
)
def add_rms_norm_quantize_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group: int,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`quantize_fp8` of ``add_rms_norm``'s norm, and its sum."""
    y, total = norm.add_rms_norm(x, residual, weight, eps=eps, offset=offset)
    return *quantize_fp8(y, group=group), total


@contract(
    "x[T,C]:A residual[T,C]:A weight[C]:W -> "
    "q[T,C]:float8_e4m3fn scale[T,C//group]:float32 y[T,C]:A residual_out[T,C]:A",
    rowwise="T",
    flops="8*T*C",
    tolerance=_FUSED_TOLERANCE,
    fuses=("add_rms_norm", "quantize_fp8"),
)
def add_rms_norm_and_quantize_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group: int,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``add_rms_norm``, and :func:`quantize_fp8` of its norm: for those who read both, as a router and experts do."""
    y, total = norm.add_rms_norm(x, residual, weight, eps=eps, offset=offset)
    return *quantize_fp8(y, group=group), y, total


@contract(
    "gate_up[T,J]:A -> q[T,J//2]:float8_e4m3fn scale[T,J//2//group]:float32",
    rowwise="T",
    flops="4*T*J",
    tolerance=_FUSED_TOLERANCE,
    fuses=("silu_mul", "quantize_fp8"),
)
def silu_mul_quantize_fp8(gate_up: torch.Tensor, *, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_fp8` of ``silu_mul(gate_up)``."""
    return quantize_fp8(elementwise.silu_mul(gate_up), group=group)
