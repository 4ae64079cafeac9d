"""Dense projections with weights in MXFP4 or NVFP4 (see kernels/mx.py) and activations as they are."""

from __future__ import annotations

import torch

from makeready.kernels.contract import Quantizes, contract
from makeready.kernels.mx import values
from makeready.kernels.numeric import to_dtype, widen


@contract(
    "x[T,K]:A weight[N,cdiv(K,128)*32]:int16 weight_scale[cdiv(N,64),cdiv(K,32),64]:S "
    "weight_global_scale?[N]:float32 bias?[N]:B -> y[T,N]:out_dtype|A",
    rowwise="T",
    flops="2*T*N*K",
    rate="x",
    merges="N",
    shares=("x",),
    quantizes=Quantizes("linear", ("mxfp4", "nvfp4")),
)
def linear_mx(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str = "",
) -> torch.Tensor:
    """``x @ w.T + bias``, accumulated in fp32 or wider.

    Kernels may multiply sums with global scales in the place of weights.
    """
    wide = widen(x)
    y = wide @ values(weight, weight_scale, weight_global_scale, inputs=x.shape[1], dtype=wide.dtype).T
    if bias is not None:
        y = y + widen(bias)
    return to_dtype(y, out_dtype, like=x)
