"""The first product of gpt-oss's experts with the clamped SwiGLU that follows it, as in experts_silu.py.

X rows of tokens, M entries (kernels/moe/route.py), E experts, J gate columns and as many up columns, K inputs
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import contract
from makeready.kernels.elementwise import clamped_swiglu
from makeready.kernels.moe.experts import grouped_linear


@contract(
    "x[X,K]:A weight[E,J,K]:W order[M]:int32 start[E+1]:int32 bias?[E,J]:B -> y[M,J//2]:out_dtype|A",
    flops="2*M*J*K",
    traffic={"weight": "distinct(E,M)*J*K"},
    rate="weight",
    fuses=("grouped_linear", "clamped_swiglu"),
)
def grouped_clamped_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    alpha: float,
    limit: float,
    out_dtype: str = "",
) -> torch.Tensor:
    """``clamped_swiglu`` of :func:`~.experts.grouped_linear`, what is between rounded to its dtype."""
    y = grouped_linear(x, weight, order, start, bias, top_k=top_k, out_dtype=out_dtype)
    return clamped_swiglu(y, alpha=alpha, limit=limit)
