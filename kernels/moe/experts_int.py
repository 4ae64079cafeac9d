"""Products of tokens with experts' weights of 4 or 8 bits (see kernels/integers.py), and the gate behind the first.

X rows of tokens, M entries (kernels/moe/route.py), E experts, N outputs (J where half of them are gates), K inputs
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Quantizes, contract
from makeready.kernels.elementwise import silu_mul
from makeready.kernels.integers import values
from makeready.kernels.moe.experts import of_experts
from makeready.kernels.numeric import to_dtype, widen

_TRAFFIC = {  # of a router that gives each expert the same chance; others are not read
    "weight": "distinct(E,M)*{0}*cdiv(K,128)*8*bits",
    "weight_scale": "distinct(E,M)*{0}*cdiv(K,group)",
    "weight_zero": "distinct(E,M)*{0}*cdiv(K,group)",
}


@contract(
    "x[X,K]:A weight[E,N,cdiv(K,128)*8*bits]:int16 weight_scale[E,cdiv(N,64),cdiv(K,group),64]:float16 "
    "weight_zero?[E,cdiv(N,64),cdiv(K,group),64]:Z order[M]:int32 start[E+1]:int32 -> y[M,N]:out_dtype|A",
    flops="2*M*N*K",
    traffic={name: text.format("N") for name, text in _TRAFFIC.items()},
    rate="x",
    quantizes=Quantizes("grouped_linear", ("int", "gguf")),
)
def grouped_linear_int(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    bits: int,
    group: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """:func:`~.experts.grouped_linear` with ``(q - zero) * scale`` as weights, or with
    ``weight_zero`` as offsets.
    """
    wide = widen(x)
    weights = values(
        weight, weight_scale, weight_zero, bits=bits, group=group, inputs=x.shape[1], dtype=wide.dtype
    )
    return to_dtype(of_experts(wide, weights, order, start, top_k), out_dtype, like=x)


@contract(
    "x[X,K]:A weight[E,J,cdiv(K,128)*8*bits]:int16 weight_scale[E,cdiv(J,64),cdiv(K,group),64]:float16 "
    "weight_zero?[E,cdiv(J,64),cdiv(K,group),64]:Z order[M]:int32 start[E+1]:int32 -> y[M,J//2]:out_dtype|A",
    flops="2*M*J*K",
    traffic={name: text.format("J") for name, text in _TRAFFIC.items()},
    rate="x",
    fuses=("grouped_linear_int", "silu_mul"),
)
def grouped_silu_mul_int(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    order: torch.Tensor,
    start: torch.Tensor,
    *,
    top_k: int,
    bits: int,
    group: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """``silu_mul`` of :func:`grouped_linear_int`."""
    y = grouped_linear_int(
        x,
        weight,
        weight_scale,
        weight_zero,
        order,
        start,
        top_k=top_k,
        bits=bits,
        group=group,
        out_dtype=out_dtype,
    )
    return silu_mul(y)
