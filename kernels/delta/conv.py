"""Causal convolution of each channel by itself over a few tokens, whose last inputs a sequence keeps.

T tokens, R rows, C channels, K taps, P blocks of the state
"""

from __future__ import annotations

import torch
from torch.nn import functional

from makeready.kernels.contract import contract
from makeready.kernels.numeric import widen


@contract(
    "x[T,C]:A weight[K,C]:W tail![P,K-1,C]:A state_in[R]:int32 state_out[R]:int32 "
    "query_start[R]:int32 query_len[R]:int32 -> y[T,C]:A",
    flops="(2*K+4)*T*C",
    traffic={"tail": "2*R*(K-1)*C"},
)
def causal_conv_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor,
    state_in: torch.Tensor,
    state_out: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
) -> torch.Tensor:
    """``y[t] = silu(sum over j of weight[j] * x[t - (K - 1) + j])``, channel by channel.

    Row r's tokens are ``query_start[r] : query_start[r] + query_len[r]``. What comes before them are the K - 1 tokens
    of ``tail[state_in[r]]``, the latest last; the row's last K - 1 inputs, old ones included, are left in
    ``tail[state_out[r]]``, which may be the same block. Rows without tokens write nothing. No row reads what another
    one writes. What tokens of no row give is nobody's; zeros here.
    """
    y = torch.zeros_like(x)
    kept = len(weight) - 1
    for start, count, before, after in zip(
        *(v.tolist() for v in (query_start, query_len, state_in, state_out)), strict=True
    ):
        if count == 0:
            continue
        rows = slice(start, start + count)
        window = torch.cat((tail[before], x[rows]))
        taps = widen(window).unfold(0, len(weight), 1)  # [tokens, C, K]
        y[rows] = functional.silu((taps * widen(weight).T).sum(-1)).to(x.dtype)
        tail[after] = window[len(window) - kept :]
    return y
