"""Products of tokens with experts' weights in MXFP4 or NVFP4 (see kernels/mx.py), and the gate behind the first.

X rows of tokens, M entries (kernels/moe/route.py), E experts, N outputs (J where half of them are gates), K inputs
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Quantizes, contract
from makeready.kernels.elementwise import clamped_swiglu, silu_mul
from makeready.kernels.moe.experts import add_bias, of_experts
from makeready.kernels.mx import values
from makeready.kernels.numeric import to_dtype, widen

_TRAFFIC = {  # of a router that gives each expert the same chance; others are not read
    "weight": "distinct(E,M)*{0}*cdiv(K,128)*32",
    "weight_scale": "distinct(E,M)*{0}*cdiv(K,32)",
}


@contract(
    "x[X,K]:A weight[E,N,cdiv(K,128)*32]:int16 weight_scale[E,cdiv(N,64),cdiv(K,32),64]:S "
    "weight_global_scale?[E,N]:float32 order[M]:int32 start[E+1]:int32 bias?[E,N]:B -> y[M,N]:out_dtype|A",
    flops="2*M*N*K",
    traffic={name: text.format("N") for name, text in _TRAFFIC.items()},
    rate="x",
    quantizes=Quantizes("grouped_linear", ("mxfp4", "nvfp4")),
)
def grouped_linear_mx(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None,
    order: torch.Tensor,
    start: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """:func:`~.experts.grouped_linear` with weights of 4 bits."""
    wide = widen(x)
    weights = values(weight, weight_scale, weight_global_scale, inputs=x.shape[1], dtype=wide.dtype)
    return to_dtype(add_bias(of_experts(wide, weights, order, start, top_k), bias, start), out_dtype, like=x)


@contract(
    "x[X,K]:A weight[E,J,cdiv(K,128)*32]:int16 weight_scale[E,cdiv(J,64),cdiv(K,32),64]:S "
    "weight_global_scale?[E,J]:float32 order[M]:int32 start[E+1]:int32 bias?[E,J]:B -> y[M,J//2]:out_dtype|A",
    flops="2*M*J*K",
    traffic={name: text.format("J") for name, text in _TRAFFIC.items()},
    rate="x",
    fuses=("grouped_linear_mx", "clamped_swiglu"),
)
def grouped_clamped_swiglu_mx(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None,
    order: torch.Tensor,
    start: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    alpha: float,
    limit: float,
    out_dtype: str = "",
) -> torch.Tensor:
    """``clamped_swiglu`` of :func:`grouped_linear_mx`, what is between rounded to its dtype."""
    given = (x, weight, weight_scale, weight_global_scale, order, start, bias)
    y = grouped_linear_mx(*given, top_k=top_k, out_dtype=out_dtype)
    return clamped_swiglu(y, alpha=alpha, limit=limit)


@contract(
    "x[X,K]:A weight[E,J,cdiv(K,128)*32]:int16 weight_scale[E,cdiv(J,64),cdiv(K,32),64]:S "
    "weight_global_scale?[E,J]:float32 order[M]:int32 start[E+1]:int32 -> y[M,J//2]:out_dtype|A",
    flops="2*M*J*K",
    traffic={name: text.format("J") for name, text in _TRAFFIC.items()},
    rate="x",
    fuses=("grouped_linear_mx", "silu_mul"),
)
def grouped_silu_mul_mx(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_global_scale: torch.Tensor | None,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """``silu_mul`` of :func:`grouped_linear_mx`."""
    given = (x, weight, weight_scale, weight_global_scale, order, start)
    return silu_mul(grouped_linear_mx(*given, top_k=top_k, out_dtype=out_dtype))
