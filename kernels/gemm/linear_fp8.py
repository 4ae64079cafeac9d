"""Dense projections of 8-bit floats with scales (see kernels/quantize.py)."""

from __future__ import annotations

import torch

from makeready.kernels.contract import Quantizes, contract
from makeready.kernels.numeric import to_dtype, widen


@contract(
    "x[T,K]:float8_e4m3fn x_scale[T,1]:float32 weight[N,K]:float8_e4m3fn weight_scale[N]:float32 bias?[N]:B"
    " -> y[T,N]:out_dtype|bfloat16",
    rowwise="T",
    flops="2*T*N*K",
    rate="weight",
    merges="N",
    shares=("x", "x_scale"),
    quantizes=Quantizes("linear", ("fp8_channel", "fp8_tensor")),
)
def linear_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
) -> torch.Tensor:
    """``(x @ weight.T) * x_scale * weight_scale + bias``: one scale a token and one an output.

    Accumulated in fp32 or wider.
    """
    y = (widen(x) @ widen(weight).T) * widen(x_scale) * widen(weight_scale)
    if bias is not None:
        y = y + widen(bias)
    return to_dtype(y, out_dtype, like=y)


@contract(
    "x[T,K]:float8_e4m3fn x_scale[T,K//block]:float32"
    " weight[N,K]:float8_e4m3fn weight_scale[(N+block-1)//block,K//block]:float32 bias?[N]:B"
    " -> y[T,N]:out_dtype|bfloat16",
    rowwise="T",
    flops="2*T*N*K",
    rate="weight",
    merges="N",
    shares=("x", "x_scale"),
    quantizes=Quantizes("linear", ("fp8_block",)),
)
def linear_fp8_block(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
    block: int,
) -> torch.Tensor:
    """:func:`linear_fp8` with one scale for each token and ``block`` inputs, and one for each square of
    ``block`` outputs and inputs (DeepSeek-V3, arXiv:2412.19437); ``block`` divides K, N may end anywhere.
    """
    scale = widen(weight_scale).repeat_interleave(block, 0)[: len(weight)].repeat_interleave(block, 1)
    y = (widen(x) * widen(x_scale).repeat_interleave(block, 1)) @ (widen(weight) * scale).T
    if bias is not None:
        y = y + widen(bias)
    return to_dtype(y, out_dtype, like=y)
