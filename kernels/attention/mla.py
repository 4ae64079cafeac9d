"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) over a paged cache of latents.

Of every token a layer keeps one vector for all heads: ``rank`` normed values, which keys and values are made of, and
behind them ``rope`` rotated ones, which are part of every head's key. The cache is ``[P, S, rank + rope]``; pages and
slots are those of :mod:`~makeready.kernels.attention.paged`.

``kv_b`` holds for each head ``nope`` rows, which make keys of latents, and ``value`` rows, which make values. Scores
are the same in two forms: with keys and values of every head, or *absorbed*, where queries are multiplied by the
first rows once and latents are their own keys and values. Few tokens behind a long context want the second, many
tokens among themselves the first.

    T tokens, R rows, H query heads, N nope, Q rope, V value, L rank, P pages, S slots of a page, B pages of a row
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from makeready.kernels.attention.paged import cached
from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.norm import rms_norm
from makeready.kernels.numeric import widen
from makeready.kernels.rope import rotate

_BF16 = Tolerance(bfloat16=1.5e-2)
_ROWS = "query_start[R]:int32 query_len[R]:int32 context_len[R]:int32"
_PAGED = "cache[P,S,rank+rope]:C page_table[R,B]:int32"


def rotate_pairs(x_THQ: torch.Tensor, rows_TQ: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate all features of every head; the result has its halves apart, whichever way ``x`` has them.

    Args:
        interleaved: features 2i and 2i + 1 are a pair, not i and i + Q/2.
    """
    if interleaved:
        x_THQ = torch.cat((x_THQ[..., 0::2], x_THQ[..., 1::2]), dim=-1)
    return rotate(x_THQ, rows_TQ)


@contract(
    "kv[T,rank+rope]:A rows[T,rope]:float32 weight[rank]:W kv_slot[T]:int32 cache![P,S,rank+rope]:C "
    "-> latent[T,rank+rope]:A",
    flops="8*T*(rank+rope)",
    traffic={"cache": "T*(rank+rope)"},
)
def mla_write(
    kv: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    kv_slot: torch.Tensor,
    cache: torch.Tensor,
    *,
    rank: int,
    rope: int,
    eps: float,
    interleaved: bool,
) -> torch.Tensor:
    """Norm the first ``rank`` features, rotate the others, store both at ``kv_slot[t]``, and give them."""
    normed = rms_norm(kv[:, :rank], weight, eps=eps)
    turned = rotate_pairs(kv[:, rank:].unsqueeze(1), rows, interleaved=interleaved).squeeze(1)
    latent = torch.cat((normed, turned), dim=-1)
    cache.flatten(0, 1)[kv_slot.long()] = cached(latent, cache.dtype)
    return latent


@contract(
    "q[T,heads*(nope+rope)]:A rows[T,rope]:float32 -> y[T,heads*(nope+rope)]:A",
    rowwise="T",
    flops="6*T*heads*rope",
)
def mla_rope(
    q: torch.Tensor, rows: torch.Tensor, *, heads: int, nope: int, rope: int, interleaved: bool
) -> torch.Tensor:
    """Rotate the last ``rope`` features of every head."""
    plain, turned = q.unflatten(-1, (heads, nope + rope)).split((nope, rope), dim=-1)
    return torch.cat((plain, rotate_pairs(turned, rows, interleaved=interleaved)), dim=-1).flatten(1)


@contract(
    "q[T,heads*(nope+rope)]:A rows[T,rope]:float32 kv_b[heads*(nope+value),rank]:A -> y[T,heads*(rank+rope)]:A",
    rowwise="T",
    tolerance=_BF16,
    flops="2*T*heads*nope*rank",
    rate="q",
    traffic={"kv_b": "heads*nope*rank"},
)
def mla_absorb(
    q: torch.Tensor,
    rows: torch.Tensor,
    kv_b: torch.Tensor,
    *,
    heads: int,
    nope: int,
    rope: int,
    value: int,
    rank: int,
    interleaved: bool,
) -> torch.Tensor:
    """Queries of latents: ``q[:nope] @ kv_b[head, :nope]`` of every head, then its rotated features."""
    plain_THN, turned = q.unflatten(-1, (heads, nope + rope)).split((nope, rope), dim=-1)
    keys_HNL = widen(kv_b).unflatten(0, (heads, nope + value))[:, :nope]
    absorbed = torch.einsum("thn,hnl->thl", widen(plain_THN), keys_HNL).to(q.dtype)
    return torch.cat((absorbed, rotate_pairs(turned, rows, interleaved=interleaved)), dim=-1).flatten(1)


@contract(
    "x[T,heads*rank]:A kv_b[heads*(nope+value),rank]:A -> y[T,heads*value]:A",
    rowwise="T",
    tolerance=_BF16,
    flops="2*T*heads*value*rank",
    rate="x",
    traffic={"kv_b": "heads*value*rank"},
)
def mla_values(
    x: torch.Tensor, kv_b: torch.Tensor, *, heads: int, nope: int, value: int, rank: int
) -> torch.Tensor:
    """Values of weighted latents: ``kv_b[head, nope:] @ x[head]`` of every head."""
    values_HVL = widen(kv_b).unflatten(0, (heads, nope + value))[:, nope:]
    x_THL = widen(x).unflatten(-1, (heads, rank))
    return torch.einsum("thl,hvl->thv", x_THL, values_HVL).to(x.dtype).flatten(1)


def _rows(*tensors: torch.Tensor) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Rows that have tokens: their number, and what the tensors say of them."""
    for r, said in enumerate(zip(*(x.tolist() for x in tensors), strict=True)):
        if said[1] > 0:
            yield r, said


def _weighted(
    score_HNK: torch.Tensor, v_KHV: torch.Tensor, visible_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted values ``[N, H, V]`` and the logarithm of the sum of weights ``[N, H]``; zeros and -inf of no keys."""
    score_HNK = score_HNK.masked_fill(~visible_NK, float("-inf"))
    log_sum_HN = score_HNK.logsumexp(-1)
    weight = (score_HNK - log_sum_HN.unsqueeze(-1)).exp().nan_to_num(0.0)
    return torch.einsum("hnk,khv->nhv", weight, v_KHV), log_sum_HN.T


def _causal(queries: int, keys: int) -> torch.Tensor:
    """Which of the keys the last ``queries`` tokens see."""
    return torch.arange(keys) <= torch.arange(keys - queries, keys).unsqueeze(-1)


@contract(
    f"q[T,heads*(rank+rope)]:A {_PAGED} {_ROWS} -> y[T,heads*rank]:A log_sum[T,heads]:float32",
    tolerance=_BF16,
    flops="2*T*context*heads*(2*rank+rope)",
    rate="q",
    traffic={"cache": "R*context*(rank+rope)"},
)
def mla_extend_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    *,
    heads: int,
    rank: int,
    rope: int,
    scale: float,
    own: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed causal attention of variable-length rows over their cached latents.

    Rows are as in :func:`~.paged.extend_attention`.

    Args:
        own: whether the step's own tokens are keys, each token's up to itself; else only those before the step.

    Returns:
        Weighted latents of every head, and natural logarithms of the sums of weights. Tokens of no row, or that see
        no key, give zeros and -inf.
    """
    y = q.new_zeros(len(q), heads * rank)
    log_sum = q.new_full((len(q), heads), float("-inf"), dtype=torch.float32)
    for r, (start, count, length) in _rows(query_start, query_len, context_len):
        keys = length if own else length - count
        pages = page_table[r, : -(-keys // cache.shape[1])].long()
        q_NHW = widen(q[start : start + count]).unflatten(-1, (heads, rank + rope))
        k_KW = cache[pages].flatten(0, 1)[:keys].to(q_NHW.dtype)
        visible = _causal(count, keys) if own else torch.ones(count, keys, dtype=torch.bool)
        score_HNK = torch.einsum("nhw,kw->hnk", q_NHW, k_KW) * scale
        out, sums = _weighted(score_HNK, k_KW[:, None, :rank].expand(-1, heads, -1), visible)
        y[start : start + count] = out.to(q.dtype).flatten(1)
        log_sum[start : start + count] = sums.float()
    return y, log_sum


@contract(
    f"q[R,heads*(rank+rope)]:A {_PAGED} context_len[R]:int32 -> y[R,heads*rank]:A",
    tolerance=_BF16,
    flops="2*R*context*heads*(2*rank+rope)",
    rate="q",
    traffic={"cache": "R*context*(rank+rope)"},
)
def mla_decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    context_len: torch.Tensor,
    *,
    heads: int,
    rank: int,
    rope: int,
    scale: float,
) -> torch.Tensor:
    """:func:`mla_extend_attention` with one query a row: its last token. ``context_len`` 0 gives zeros."""
    one = (context_len > 0).to(torch.int32)
    start = torch.arange(len(q), dtype=torch.int32)
    return mla_extend_attention.reference(
        q,
        cache,
        page_table,
        start,
        one,
        context_len,
        heads=heads,
        rank=rank,
        rope=rope,
        scale=scale,
        own=True,
    )[0]


@contract(
    "q[T,heads*(nope+rope)]:A kv[T,heads*(nope+value)]:A latent[T,rank+rope]:A "
    "query_start[R]:int32 query_len[R]:int32 -> y[T,heads*value]:A log_sum[T,heads]:float32",
    tolerance=_BF16,
    flops="T*T*heads*(nope+rope+value)",
    rate="q",
)
def mla_own_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    latent: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    *,
    heads: int,
    nope: int,
    rope: int,
    value: int,
    rank: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of each row's tokens over those of the same step.

    A head's key is its ``nope`` features of ``kv`` and the last ``rope`` of ``latent``; its values are the last
    ``value`` of ``kv``.

    Returns:
        Weighted values, and natural logarithms of the sums of weights. Tokens of no row give zeros and -inf.
    """
    y = q.new_zeros(len(q), heads * value)
    log_sum = q.new_full((len(q), heads), float("-inf"), dtype=torch.float32)
    for _, (start, count) in _rows(query_start, query_len):
        rows = slice(start, start + count)
        q_NHD = widen(q[rows]).unflatten(-1, (heads, nope + rope))
        key, v_NHV = widen(kv[rows]).unflatten(-1, (heads, nope + value)).split((nope, value), dim=-1)
        turned = widen(latent[rows, rank:]).unsqueeze(1).expand(-1, heads, -1)
        score_HNK = torch.einsum("nhd,khd->hnk", q_NHD, torch.cat((key, turned), dim=-1)) * scale
        out, sums = _weighted(score_HNK, v_NHV, _causal(count, count))
        y[rows], log_sum[rows] = out.to(q.dtype).flatten(1), sums.float()
    return y, log_sum


@contract(
    "x[T,heads*value]:A x_log_sum[T,heads]:float32 y[T,heads*value]:A y_log_sum[T,heads]:float32 "
    "-> z[T,heads*value]:A",
    rowwise="T",
    flops="4*T*heads*value",
)
def merge_attention(
    x: torch.Tensor,
    x_log_sum: torch.Tensor,
    y: torch.Tensor,
    y_log_sum: torch.Tensor,
    *,
    heads: int,
    value: int,
) -> torch.Tensor:
    """Attention over two sets of keys from attention over each (Ye et al. 2025, arXiv:2501.01005, section 2.2).

    Where a logarithm is -inf, its part may be anything; where both are, the result is zeros.
    """
    parts = torch.stack([widen(part).unflatten(-1, (heads, value)) for part in (x, y)])
    sums = torch.stack((x_log_sum, y_log_sum)).to(parts.dtype)
    parts = parts.masked_fill((sums == float("-inf")).unsqueeze(-1), 0.0)
    weight = (sums - sums.logsumexp(0)).exp().nan_to_num(0.0)
    return (parts * weight.unsqueeze(-1)).sum(0).to(x.dtype).flatten(1)
