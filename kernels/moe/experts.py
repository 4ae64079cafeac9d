"""Products of tokens with their experts' weights, whose sizes only the device knows.

X rows of tokens, M entries (kernels/moe/route.py), E experts, N outputs, K inputs
"""

from __future__ import annotations

import itertools

import torch

from makeready.kernels.contract import Quantizes, contract
from makeready.kernels.numeric import to_dtype, widen

_TRAFFIC = {
    "weight": "distinct(E,M)*N*K"
}  # of a router that gives each expert the same chance; others are not read


def of_experts(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, start: torch.Tensor, top_k: int
) -> torch.Tensor:
    """float32 or wider ``[M, N]``: of each expert's entries with its weights; zeros from the last entry on."""
    bounds = start.tolist()
    live = order[: bounds[-1]].long()
    rows = x[live // top_k] if top_k else x[: bounds[-1]]
    y = torch.zeros(len(order), weight.shape[1], dtype=x.dtype)
    for e, (first, stop) in enumerate(itertools.pairwise(bounds)):
        if stop > first:
            y[first:stop] = rows[first:stop] @ weight[e].T
    return y


def add_bias(y: torch.Tensor, bias: torch.Tensor | None, start: torch.Tensor) -> torch.Tensor:
    """``y[M, N]`` with each entry's expert's bias added in place; None: as it is."""
    if bias is not None:
        for e, (first, stop) in enumerate(itertools.pairwise(start.tolist())):
            y[first:stop] += bias[e]
    return y


@contract(
    "x[X,K]:A weight[E,N,K]:W order[M]:int32 start[E+1]:int32 bias?[E,N]:B -> y[M,N]:out_dtype|A",
    flops="2*M*N*K",
    traffic=_TRAFFIC,
    rate="weight",
)
def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """``y[j] = x[order[j] // top_k] @ weight[e].T + bias[e]`` for the entries j of expert e.

    These are ``start[e] <= j < start[e + 1]``.
    With ``top_k`` 0 the rows of ``x`` are the entries: ``y[j] = x[j] @ weight[e].T``. Rows of ``y`` from
    ``start[E]`` on are zeros. Accumulated in fp32 or wider.
    """
    y = add_bias(of_experts(widen(x), widen(weight), order, start, top_k), bias, start)
    return to_dtype(y, out_dtype, like=x)


@contract(
    "x[X,K]:float8_e4m3fn x_scale[X,1]:float32 weight[E,N,K]:float8_e4m3fn weight_scale[E,N]:float32 "
    "order[M]:int32 start[E+1]:int32 -> y[M,N]:out_dtype|bfloat16",
    flops="2*M*N*K",
    traffic=_TRAFFIC,
    rate="weight",
    quantizes=Quantizes("grouped_linear", ("fp8_channel", "fp8_tensor")),
)
def grouped_linear_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    out_dtype: str,
) -> torch.Tensor:
    """:func:`grouped_linear` of 8-bit floats with one scale a token and one an output of each expert."""
    wide = widen(weight) * widen(weight_scale).unsqueeze(-1)
    y = of_experts(widen(x) * widen(x_scale), wide, order, start, top_k)
    return to_dtype(y, out_dtype, like=y)


@contract(
    "x[X,K]:int8 x_scale[X,1]:float32 weight[E,N,K]:int8 weight_scale[E,N]:float32 "
    "order[M]:int32 start[E+1]:int32 -> y[M,N]:out_dtype|bfloat16",
    flops="2*M*N*K",
    traffic=_TRAFFIC,
    rate="weight",
    quantizes=Quantizes("grouped_linear", ("int8_channel", "int8_tensor")),
)
def grouped_linear_int8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    out_dtype: str,
) -> torch.Tensor:
    """:func:`grouped_linear_fp8` of 8-bit integers, whose sums are exact (see kernels/gemm/linear_int8.py)."""
    wide = weight.double() * widen(weight_scale).unsqueeze(-1)
    y = of_experts(x.double() * widen(x_scale), wide, order, start, top_k)
    return to_dtype(y, out_dtype, like=y)


@contract(
    "x[X,K]:float8_e4m3fn x_scale[X,K//block]:float32 "
    "weight[E,N,K]:float8_e4m3fn weight_scale[E,(N+block-1)//block,K//block]:float32 "
    "order[M]:int32 start[E+1]:int32 -> y[M,N]:out_dtype|bfloat16",
    flops="2*M*N*K",
    traffic=_TRAFFIC,
    rate="weight",
    quantizes=Quantizes("grouped_linear", ("fp8_block",)),
)
def grouped_linear_fp8_block(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    out_dtype: str,
    block: int,
) -> torch.Tensor:
    """:func:`grouped_linear` with one scale for each token and ``block`` inputs, and one for each square of
    ``block`` outputs and inputs of each expert (DeepSeek-V3, arXiv:2412.19437).
    """
    scale = widen(weight_scale).repeat_interleave(block, 1)[:, : weight.shape[1]].repeat_interleave(block, 2)
    x = widen(x) * widen(x_scale).repeat_interleave(block, 1)
    y = of_experts(x, widen(weight) * scale, order, start, top_k)
    return to_dtype(y, out_dtype, like=y)
