"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464): a recurrence in attention's place.

Every value head has a state ``S[Dk, Dv]``, which maps keys to values. A token makes all of it smaller, and then
corrects what its key is mapped to::

    S = exp(g) * S
    S = S + k (beta * (v - k S))        and it reads     y = q S

with ``g = -exp(a_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``; q and k are divided by their lengths, and
q by the root of Dk. Key heads are shared: value head h takes key head ``h * Hk // Hv``.

    T tokens, R rows, Hk key heads, Hv value heads, Dk, Dv features of a key and a value, P blocks of the state
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from makeready.kernels.contract import ANY, INVARIANT, Tolerance, contract

EPS = 1e-6  # beside the squared length of q and k, as the models were trained
CHUNK = 64  # tokens that are worked on together where not one by one

_RULE = (
    "qkv[T,2*key_heads*key_dim+value_heads*value_dim]:A ba[T,2*value_heads]:float32 "
    "a_log[value_heads]:float32 dt_bias[value_heads]:float32 state![P,value_heads,key_dim,value_dim]:C "
    "state_in[R]:int32 state_out[R]:int32 query_start[R]:int32 query_len[R]:int32 -> y[T,value_heads*value_dim]:A"
)
_STATE = {"state": "2*R*value_heads*key_dim*value_dim"}
_BY_TOKENS = "7*T*value_heads*key_dim*value_dim"
# Of a token in a chunk of 64: three products with the state, and five within the chunk, whose inverse is a sixth.
_BY_CHUNKS = "T*value_heads*(6*key_dim*value_dim+128*(3*key_dim+2*value_dim)+8192)"
# Sums in another order may round a number of a bf16 state to its other neighbour, which moves fp32 results so much.
_TOLERANCE = Tolerance(float32=2e-4, bfloat16=1.5e-2)
# Within a chunk 16-bit numbers are multiplied. Of random keys that costs 3e-3 in bf16; of keys that are nearly equal
# where nothing decays, the worst that a search found is 1.8e-2 of the results and 1.2e-2 of the states
# (tests/kernels/test_delta_rounding.py); fp16 is eight times as fine.
_OF_CHUNKS = Tolerance(float32=1.5e-2, float16=2.5e-3, bfloat16=2e-2)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def _token(
    s_HKV: torch.Tensor,
    qkv: torch.Tensor,
    ba: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    key_heads: int,
    key_dim: int,
) -> torch.Tensor:
    """What one token ``qkv[N]`` reads, ``[Hv, Dv]``, after the states ``s_HKV`` were changed in place."""
    value_heads, _, value_dim = s_HKV.shape
    q, k, v = qkv.split((key_heads * key_dim, key_heads * key_dim, value_heads * value_dim))
    q_HK, k_HK = (
        _unit(x.view(key_heads, key_dim)).repeat_interleave(value_heads // key_heads, dim=0) for x in (q, k)
    )
    b_H, a_H = ba.chunk(2)
    decay_H = torch.exp(-torch.exp(a_log) * functional.softplus(a_H + dt_bias))
    s_HKV *= decay_H[:, None, None]
    known_HV = torch.einsum("hk,hkv->hv", k_HK, s_HKV)
    correction_HV = (v.view(value_heads, value_dim) - known_HV) * torch.sigmoid(b_H)[:, None]
    s_HKV += k_HK[:, :, None] * correction_HV[:, None, :]
    return torch.einsum("hk,hkv->hv", q_HK * key_dim**-0.5, s_HKV)


def _by_tokens(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_in: torch.Tensor,
    state_out: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    key_heads: int,
    key_dim: int,
    value_heads: int,
    value_dim: int,
    *,
    each: bool = False,
) -> torch.Tensor:
    """``each``: states are rounded to their dtype behind every token, not only behind a row's last."""
    wide = torch.promote_types(torch.promote_types(qkv.dtype, state.dtype), torch.float32)
    y = torch.zeros(len(qkv), value_heads * value_dim, dtype=qkv.dtype)
    for start, count, before, after in zip(
        *(x.tolist() for x in (query_start, query_len, state_in, state_out)), strict=True
    ):
        if count == 0:
            continue
        s_HKV = state[before].to(wide, copy=True)
        for t in range(start, start + count):
            one, two = qkv[t].to(wide, copy=True), ba[t].to(wide, copy=True)
            made = _token(s_HKV, one, two, a_log, dt_bias, key_heads, key_dim)
            y[t] = made.flatten().to(y.dtype)
            if each:
                s_HKV = s_HKV.to(state.dtype).to(wide)
        state[after] = s_HKV.to(state.dtype)
    return y


@contract(_RULE, tolerance=_TOLERANCE, flops=_BY_TOKENS, traffic=_STATE)
def recurrent_delta_rule(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_in: torch.Tensor,
    state_out: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    *,
    key_heads: int,
    key_dim: int,
    value_heads: int,
    value_dim: int,
) -> torch.Tensor:
    """:func:`gated_delta_rule`, token by token, so that cutting a sequence anywhere changes no bit.

    So states of 16 bits are rounded behind every token.
    """
    return _by_tokens(
        qkv, ba, a_log, dt_bias, state, state_in, state_out, query_start, query_len,
        key_heads, key_dim, value_heads, value_dim, each=True,
    )  # fmt: skip


@contract(_RULE, tolerance=_OF_CHUNKS, flops=_BY_CHUNKS, rate="qkv", traffic=_STATE)
def chunk_delta_rule(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_in: torch.Tensor,
    state_out: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    *,
    key_heads: int,
    key_dim: int,
    value_heads: int,
    value_dim: int,
) -> torch.Tensor:
    """:func:`gated_delta_rule`; kernels may work on :data:`CHUNK` tokens of a row at once (arXiv:2406.06484)."""
    return _by_tokens(
        qkv, ba, a_log, dt_bias, state, state_in, state_out, query_start, query_len,
        key_heads, key_dim, value_heads, value_dim,
    )  # fmt: skip


def _by_chunks(program: Any, call: Any) -> list[Any]:
    return [replace(call, op="chunk_delta_rule")]


def _recurrent(program: Any, call: Any) -> list[Any]:
    return [replace(call, op="recurrent_delta_rule")]


@contract(
    _RULE,
    tolerance=_TOLERANCE,
    flops=_BY_TOKENS,
    traffic=_STATE,
    expands={"decode": _recurrent, ANY: _by_chunks, INVARIANT: _recurrent},
)
def gated_delta_rule(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    state_in: torch.Tensor,
    state_out: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    *,
    key_heads: int,
    key_dim: int,
    value_heads: int,
    value_dim: int,
) -> torch.Tensor:
    """The recurrence of the module's docstring over variable-length rows, as models call it.

    ``qkv`` has queries, keys and values of all heads side by side, ``ba`` the b of all value heads, then the a. Row
    r's tokens are ``query_start[r] : query_start[r] + query_len[r]``; it begins with ``state[state_in[r]]`` and
    leaves its state in ``state[state_out[r]]``, which may be the same block, rounded to its dtype there. Rows without
    tokens write nothing. No row reads what another one writes. What tokens of no row give is nobody's; zeros here.
    """
    return _by_tokens(
        qkv, ba, a_log, dt_bias, state, state_in, state_out, query_start, query_len,
        key_heads, key_dim, value_heads, value_dim,
    )  # fmt: skip
