"""Dense projection."""

from __future__ import annotations

import torch

from makeready.kernels.contract import contract
from makeready.kernels.numeric import to_dtype, widen


@contract(
    "x[T,K]:A weight[N,K]:W bias?[N]:B -> y[T,N]:out_dtype|A",
    rowwise="T",
    flops="2*T*N*K",
    rate="weight",
    merges="N",
    shares=("x",),
)
def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: str = ""
) -> torch.Tensor:
    """``x @ weight.T + bias``, accumulated in fp32 or wider.

    ``out_dtype`` overrides the dtype of the result: logits leave as fp32 whatever the activations are.
    """
    y = widen(x) @ widen(weight).T
    if bias is not None:
        y = y + widen(bias)
    return to_dtype(y, out_dtype, like=x)
