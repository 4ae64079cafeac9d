"""Paged KV cache: writing and attending.

A layer's cache is two tensors ``[P, S, G, D]``: pages, slots of a page, KV heads, head size. Token ``i``
of a row lies in page ``page_table[r, i // S]``, slot ``i % S``. Page 0 belongs to nobody: padding tokens
write there, and nothing reads it.

The cache may have fewer bits than the activations: values are rounded to nearest when they are written, and
widened when they are read. In float8_e4m3fn they are kept as they are, with no scale, and saturate at 448.

    T tokens, R rows, H query heads, G KV heads, D head size, B pages of a row at most, L tokens of context
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from makeready.kernels.contract import ANY, Tolerance, contract
from makeready.kernels.norm import rms_norm
from makeready.kernels.numeric import widen
from makeready.kernels.quantize import FP8_MAX
from makeready.kernels.rope import rotate

_CACHE = "k_cache{mark}[P,S,kv_heads,head_dim]:C v_cache{mark}[P,S,kv_heads,head_dim]:C"
READ = {"k_cache": "R*context*kv_heads*head_dim", "v_cache": "R*context*kv_heads*head_dim"}
EXTEND_FLOPS = "4*T*context*heads*head_dim"
_EXTEND = (
    f"q[T,heads*head_dim]:A {_CACHE.format(mark='')} page_table[R,B]:int32 "
    "query_start[R]:int32 query_len[R]:int32 context_len[R]:int32 sinks?[heads]:float32 -> y[T,heads*head_dim]:A"
)
_WRITE = {"k_cache": "T*kv_heads*head_dim", "v_cache": "T*kv_heads*head_dim"}


def cached(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` as a cache of ``dtype`` holds it: rounded to nearest, saturated where 8 bits have no infinity."""
    if dtype == torch.float8_e4m3fn:  # whether PyTorch saturates depends on its version
        x = x.clamp(-FP8_MAX, FP8_MAX)
    return x.to(dtype)


def _store(cache: torch.Tensor, kv_slot: torch.Tensor, x_TGD: torch.Tensor) -> None:
    cache.flatten(0, 1)[kv_slot.long()] = cached(x_TGD, cache.dtype)


@contract(
    f"k[T,kv_heads*head_dim]:A v[T,kv_heads*head_dim]:A kv_slot[T]:int32 {_CACHE.format(mark='!')} -> ",
    traffic=_WRITE,
)
def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    kv_heads: int,
    head_dim: int,
) -> None:
    """Store token t's key and value at ``kv_slot[t]`` (page * S + slot), in the cache's dtype."""
    _store(k_cache, kv_slot, k.unflatten(-1, (kv_heads, head_dim)))
    _store(v_cache, kv_slot, v.unflatten(-1, (kv_heads, head_dim)))


@contract(
    "qkv[T,(heads+2*kv_heads)*head_dim]:A rows[T,Q]:float32 q_norm?[head_dim]:W k_norm?[head_dim]:W "
    f"kv_slot[T]:int32 {_CACHE.format(mark='!')} -> q[T,heads*head_dim]:A",
    flops="8*T*(heads+kv_heads)*head_dim",
    traffic=_WRITE,
)
def norm_rope_kv_write(
    qkv: torch.Tensor,
    rows: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    kv_slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    offset: float = 0.0,
) -> torch.Tensor:
    """Everything between the q/k/v projection and attention: head norms, rotation, cache write.

    Without ``q_norm`` and ``k_norm`` the heads are rotated as they are; ``offset`` is added to both.
    """
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = (rms_norm(x, w, eps=eps, offset=offset) for x, w in ((q, q_norm), (k, k_norm)))
    _store(k_cache, kv_slot, rotate(k, rows))
    _store(v_cache, kv_slot, v)
    return rotate(q, rows).flatten(1)


def attend(
    q_NHD: torch.Tensor,
    k_LGD: torch.Tensor,
    v_LGD: torch.Tensor,
    sinks_H: torch.Tensor | None,
    visible_NL: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention of N queries over those of L tokens that each sees, grouped-query, in fp32 or wider."""
    group = q_NHD.shape[1] // k_LGD.shape[1]
    wide = widen(q_NHD)
    k_LHD, v_LHD = (x.to(wide.dtype).repeat_interleave(group, dim=1) for x in (k_LGD, v_LGD))
    score_HNL = torch.einsum("nhd,lhd->hnl", wide, k_LHD) * scale
    score_HNL = score_HNL.masked_fill(~visible_NL, float("-inf"))
    if sinks_H is not None:
        sink_HN1 = sinks_H.to(wide.dtype)[:, None, None].expand(-1, len(q_NHD), 1)
        weight_HNL = torch.cat((score_HNL, sink_HN1), -1).softmax(-1)[..., :-1]
    else:
        weight_HNL = score_HNL.softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weight_HNL, v_LHD).to(q_NHD.dtype)


def _causal(queries: int, length: int, window: int) -> torch.Tensor:
    """Which of ``length`` tokens the last ``queries`` see: ``[queries, length]`` bool."""
    at, key = torch.arange(length - queries, length).unsqueeze(-1), torch.arange(length)
    return (key <= at) & (key > at - window) if window else key <= at


@contract(
    _EXTEND,
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops=EXTEND_FLOPS,
    rate="q",
    traffic=READ,
)
def extend_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention of variable-length rows over their cached context.

    Row r's queries are tokens ``query_start[r] : query_start[r] + query_len[r]``, the last ones of its
    ``context_len[r]`` tokens, whose keys and values (the queries' own too) lie in the cache.
    ``window`` > 0 lets a token see itself and the ``window - 1`` before it; what no token of a row sees may be
    anything, a page of others or NaN. Tokens of no row give zeros. ``sinks`` are a logit of each head that joins the
    denominators of its softmaxes and has no value (gpt-oss, arXiv:2508.10925); they are not scaled.
    """
    y = torch.zeros_like(q)
    for r, (start, count, length) in enumerate(
        zip(query_start.tolist(), query_len.tolist(), context_len.tolist(), strict=True)
    ):
        if count == 0:
            continue
        first = max(0, length - count - window + 1) if window else 0
        pages = page_table[r, : -(-length // k_cache.shape[1])].long()
        k_LGD, v_LGD = (c[pages].flatten(0, 1)[first:length] for c in (k_cache, v_cache))
        rows = slice(start, start + count)
        q_NHD = q[rows].unflatten(-1, (heads, head_dim))
        visible = _causal(count, len(k_LGD), window)
        y[rows] = attend(q_NHD, k_LGD, v_LGD, sinks, visible, scale=scale).flatten(1)
    return y


@contract(
    f"q[R,heads*head_dim]:A {_CACHE.format(mark='')} page_table[R,B]:int32 "
    "context_len[R]:int32 sinks?[heads]:float32 -> y[R,heads*head_dim]:A",
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops="4*R*context*heads*head_dim",
    rate="q",
    traffic=READ,
)
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """:func:`extend_attention` with one query a row: its last token. ``context_len`` 0 gives zeros."""
    one = (context_len > 0).to(torch.int32)
    start = torch.arange(len(q), dtype=torch.int32)
    return extend_attention.reference(
        q, k_cache, v_cache, page_table, start, one, context_len, sinks,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=window,
    )  # fmt: skip


@contract(
    _EXTEND,
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops=EXTEND_FLOPS,
    rate="q",
    traffic=READ,
)
def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """:func:`extend_attention` where no row has more than ``cdiv(T, R)`` queries."""
    return extend_attention.reference(
        q, k_cache, v_cache, page_table, query_start, query_len, context_len, sinks,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=window,
    )  # fmt: skip


def _extend(program: Any, call: Any) -> list[Any]:
    return [replace(call, op="extend_attention")]


def _verify(program: Any, call: Any) -> list[Any]:
    return [replace(call, op="verify_attention")]


def _decode(program: Any, call: Any) -> list[Any]:
    kept = {k: v for k, v in call.operands.items() if k not in ("query_start", "query_len")}
    return [replace(call, op="decode_attention", operands=kept)]


@contract(
    _EXTEND,
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops=EXTEND_FLOPS,
    rate="q",
    traffic=READ,
    expands={"decode": _decode, "verify": _verify, ANY: _extend},
)
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Attention as models call it: what :func:`extend_attention` says, in steps of every kind.

    Decode steps run :func:`decode_attention`, those that verify drafts :func:`verify_attention`.
    """
    return extend_attention.reference(
        q, k_cache, v_cache, page_table, query_start, query_len, context_len, sinks,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=window,
    )  # fmt: skip
