"""Dense projection of a gated MLP, to the value that its last projection reads."""

from __future__ import annotations

import torch

from makeready.kernels import elementwise
from makeready.kernels.contract import contract
from makeready.kernels.gemm.linear import linear


@contract("x[T,K]:A weight[J,K]:W -> y[T,J//2]:A", rowwise="T", flops="2*T*J*K")
def linear_silu_mul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``silu_mul(linear(x, weight))``, the projection rounded to the activations' dtype in between.

    The first half of the weights' rows is gate, the second up.
    """
    return elementwise.silu_mul(linear(x, weight))
