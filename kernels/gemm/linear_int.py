"""Dense projections with weights of 4 or 8 bits (see kernels/integers.py) and activations as they are."""

from __future__ import annotations

import torch

from makeready.kernels.contract import Quantizes, contract
from makeready.kernels.integers import values
from makeready.kernels.numeric import to_dtype, widen


@contract(
    "x[T,K]:A weight[N,cdiv(K,128)*8*bits]:int16 weight_scale[cdiv(N,64),cdiv(K,group),64]:float16 "
    "weight_zero?[cdiv(N,64),cdiv(K,group),64]:Z bias?[N]:B -> y[T,N]:out_dtype|A",
    rowwise="T",
    flops="2*T*N*K",
    rate="x",
    merges="N",
    shares=("x",),
    quantizes=Quantizes("linear", ("int", "gguf")),
)
def linear_int(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """``x @ ((q - zero) * scale).T + bias``, accumulated in fp32 or wider.

    ``weight_zero`` may be offsets of fp16, added to ``(q - 2 ** (bits - 1)) * scale``. Kernels may round weights to
    the dtype of ``x`` after they are scaled.
    """
    dtype = widen(x).dtype
    wide = values(weight, weight_scale, weight_zero, bits=bits, group=group, inputs=x.shape[1], dtype=dtype)
    y = widen(x) @ wide.T
    if bias is not None:
        y = y + widen(bias)
    return to_dtype(y, out_dtype, like=x)
