"""Dense projections of 8-bit integers with scales (see kernels/quantize_int8.py)."""

from __future__ import annotations

import torch

from makeready.kernels.contract import Quantizes, contract
from makeready.kernels.numeric import to_dtype, widen

MOST_INPUTS = 1 << 17  # whose products an int32 holds the sum of


@contract(
    "x[T,K]:int8 x_scale[T,1]:float32 weight[N,K]:int8 weight_scale[N]:float32 bias?[N]:B"
    " -> y[T,N]:out_dtype|bfloat16",
    rowwise="T",
    flops="2*T*N*K",
    rate="weight",
    merges="N",
    shares=("x", "x_scale"),
    quantizes=Quantizes("linear", ("int8_channel", "int8_tensor")),
)
def linear_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
) -> torch.Tensor:
    """``(x @ weight.T) * x_scale * weight_scale + bias``: one scale a token and one an output.

    Sums are exact: int32 holds those of up to 131,072 inputs. float64, which the reference adds in, holds them too.
    """
    y = (x.double() @ weight.double().T) * widen(x_scale) * widen(weight_scale)
    if bias is not None:
        y = y + widen(bias)
    return to_dtype(y, out_dtype, like=y)
