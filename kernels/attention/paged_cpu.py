"""Paged KV cache on the CPU: the references without loops over rows or temporary copies.

T tokens, R rows, H query heads, G KV heads, N = H / G, D head size, L tokens of context, B pages
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from makeready.kernels import native
from makeready.kernels.attention.paged import (
    cached,
    decode_attention,
    extend_attention,
    kv_write,
    norm_rope_kv_write,
    verify_attention,
)
from makeready.kernels.contract import Contract
from makeready.kernels.norm_cpu import normalise
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(kv_write, Contract)
assert isinstance(extend_attention, Contract)


def _activations_float32(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return all(specs[name].dtype == "float32" for name in ("qkv", "q_norm", "k_norm", "q") if name in specs)


def _native_norm_rope_kv_write(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (qkv, rows, q_norm, k_norm, kv_slot, k_cache, v_cache), (q,) = operands, results
    if not _fits(k_cache, attrs):
        return None
    if q_norm is None or k_norm is None:
        q_norm = k_norm = None
    return native.prepare(
        "norm_rope_kv_write", qkv, qkv.stride(0), rows, rows.stride(0), q_norm, k_norm, kv_slot, k_cache, v_cache,
        None, q, q.stride(0), len(qkv), attrs["heads"], attrs["kv_heads"], attrs["head_dim"], rows.shape[-1],
        native.DTYPES[k_cache.dtype], float(attrs["eps"]), float(attrs.get("offset", 0)),
        long=len(qkv) > native.MANY_TOKENS,
    )  # fmt: skip


def _bind_decode_attention(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    *before, context_len, sinks = operands
    return _native_attention((*before, None, None, context_len, sinks), results, attrs, tiled=False)


def _bind_extend_attention(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    return _native_attention(operands, results, attrs, tiled=attrs["head_dim"] <= native.MAX_TILED)


def _bind_queries(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    return _native_attention(operands, results, attrs, tiled=False)


def _native_attention(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any], *, tiled: bool
) -> Callable[[], None] | None:
    (q, k_cache, v_cache, page_table, query_start, query_len, context_len, sinks), (y,) = operands, results
    if not _fits(k_cache, attrs):
        return None
    return native.prepare(
        "attention", q, q.stride(0), k_cache, v_cache, None, page_table, page_table.stride(0), query_start, query_len,
        context_len, sinks, y, y.stride(0), len(page_table), len(q), attrs["heads"], attrs["kv_heads"],
        attrs["head_dim"], k_cache.shape[1], attrs["window"], native.DTYPES[k_cache.dtype], float(attrs["scale"]),
        tiled, long=len(q) > native.MANY_TOKENS,
    )  # fmt: skip


def _fits(cache: torch.Tensor, attrs: Mapping[str, Any]) -> bool:
    group = attrs["heads"] // attrs["kv_heads"]
    return cache.dtype in native.DTYPES and attrs["head_dim"] <= native.MAX_HEAD and group <= native.MAX_GROUP


@kernel(
    norm_rope_kv_write, "fused", target="cpu", applies=_activations_float32, bind=_native_norm_rope_kv_write
)
def norm_rope_kv_write_cpu(
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
    """Queries and keys are rotated side by side, since the rotation is the same for all heads."""
    x_THD = qkv.unflatten(-1, (-1, head_dim))
    turned = heads + kv_heads
    qk, v = x_THD[:, :turned], x_THD[:, turned:]
    if q_norm is not None and k_norm is not None:
        parts = ((qk[:, :heads], q_norm), (qk[:, heads:], k_norm))
        qk = torch.cat([normalise(x, weight, eps, offset) for x, weight in parts], dim=1)
    half = rows.shape[-1] // 2
    cos, sin = rows.unsqueeze(1).split(half, dim=-1)
    first, second = qk[..., :half], qk[..., half : 2 * half]
    out = torch.empty_like(qk, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if head_dim > 2 * half:
        out[..., 2 * half :] = qk[..., 2 * half :]
    slot = kv_slot.long()
    k_cache.flatten(0, 1)[slot] = cached(out[:, heads:], k_cache.dtype)
    v_cache.flatten(0, 1)[slot] = cached(v, v_cache.dtype)
    return out[:, :heads].flatten(1)


@kernel(
    norm_rope_kv_write,
    "rows",
    target="cpu",
    invariant=True,
    ordinary=False,
    applies=_activations_float32,
    bind=_native_norm_rope_kv_write,
)
def norm_rope_kv_write_rows(
    qkv: torch.Tensor,
    rows: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    kv_slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    **attrs: Any,
) -> torch.Tensor:
    """:func:`norm_rope_kv_write_cpu` of every token by itself, compiled for any number of them."""
    made = [
        norm_rope_kv_write_cpu(x.clone(), row.clone(), q_norm, k_norm, slot, k_cache, v_cache, **attrs)
        for x, row, slot in zip(qkv.split(1), rows.split(1), kv_slot.split(1), strict=True)
    ]
    return torch.cat(made)


# Values are rounded one by one.
kernel(kv_write, "rows", target="cpu", invariant=True, ordinary=False)(kv_write.reference)


def _context(cache: torch.Tensor, pages: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the keys or values in the pages ``[R, B]``: ``[R, B * S, G, D]``."""
    found = cache.index_select(0, pages.reshape(-1)).to(dtype)
    return found.view(len(pages), -1, *cache.shape[2:])


@kernel(decode_attention, "batched", target="cpu", applies=_activations_float32, bind=_bind_decode_attention)
def decode_attention_cpu(
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
    """All rows at once, each padded to the pages of the longest; a KV head's N query heads are its queries.

    A sink is the score of one more key, which is 0, as is its value.

    Flash attention over the gathered pages takes 410 µs at 8 rows of 128 tokens (3 KV heads of 64) where
    two batched products and a softmax take 680.
    """
    longest = int(context_len.max())
    if longest == 0:
        return torch.zeros_like(q)
    pages = page_table[:, : -(-longest // k_cache.shape[1])]
    k_RLGD, v_RLGD = (_context(cache, pages, q.dtype) for cache in (k_cache, v_cache))
    key, length = torch.arange(k_RLGD.shape[1]), context_len.unsqueeze(-1)
    hidden = key >= length
    if window:
        hidden |= key < length - window
    # Page tails and unused table entries may hold NaN, which neither a bias nor a weight of zero silences.
    unread = hidden.flatten().nonzero().squeeze(1)
    k_RLGD.flatten(0, 1).index_fill_(0, unread, 0.0)
    v_RLGD.flatten(0, 1).index_fill_(0, unread, 0.0)
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None, :]
    if sinks is not None:
        k_RLGD, v_RLGD = (functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k_RLGD, v_RLGD))
        sink_RGN1 = sinks.view(1, kv_heads, -1, 1).expand(len(q), -1, -1, 1)
        bias = torch.cat((bias.expand(*sink_RGN1.shape[:3], -1), sink_RGN1), -1)
    y = functional.scaled_dot_product_attention(
        q.view(-1, kv_heads, heads // kv_heads, head_dim),
        k_RLGD.transpose(1, 2),
        v_RLGD.transpose(1, 2),
        attn_mask=bias,
        scale=scale,
    )
    return y.flatten(1).masked_fill_((context_len == 0).unsqueeze(-1), 0.0)


@kernel(verify_attention, "rowwise", target="cpu", applies=_activations_float32, bind=_bind_extend_attention)
@kernel(extend_attention, "rowwise", target="cpu", applies=_activations_float32, bind=_bind_extend_attention)
def extend_attention_cpu(
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
    """Row by row through PyTorch's flash attention, which handles grouped heads and the causal mask."""
    y = torch.zeros_like(q)
    page_size = k_cache.shape[1]
    for r, (start, count, length) in enumerate(
        zip(query_start.tolist(), query_len.tolist(), context_len.tolist(), strict=True)
    ):
        if count == 0:
            continue
        first = max(0, length - count - window + 1) if window else 0  # pages before may hold anything
        pages = page_table[r : r + 1, : -(-length // page_size)]
        k_1LGD, v_1LGD = (_context(cache, pages, q.dtype)[:, first:length] for cache in (k_cache, v_cache))
        q_1HND = q[start : start + count].view(1, count, heads, head_dim).transpose(1, 2)
        whole = count == length and not window and sinks is None
        mask = None if whole else _visible(count, length - first, window)
        if mask is not None and sinks is not None:
            k_1LGD, v_1LGD = (functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k_1LGD, v_1LGD))
            bias = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf")).expand(heads, -1, -1)
            mask = torch.cat((bias, sinks[:, None, None].expand(-1, count, 1)), -1)
        made = functional.scaled_dot_product_attention(
            q_1HND,
            k_1LGD.transpose(1, 2),
            v_1LGD.transpose(1, 2),
            attn_mask=mask,
            is_causal=whole,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        y[start : start + count] = made.transpose(1, 2).reshape(count, -1)
    return y


def _visible(count: int, length: int, window: int) -> torch.Tensor:
    """Which of ``length`` tokens the last ``count`` see: ``[count, length]`` bool."""
    at, key = torch.arange(length - count, length).unsqueeze(-1), torch.arange(length)
    return (key <= at) & (key > at - window) if window else key <= at


@kernel(
    extend_attention,
    "queries",
    target="cpu",
    invariant=True,
    ordinary=False,
    applies=_activations_float32,
    bind=_bind_queries,
)
def extend_attention_queries(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    **attrs: Any,
) -> torch.Tensor:
    """Every query by itself over the keys that it sees, compiled or as a row of its own."""
    y = torch.zeros_like(q)
    one = torch.ones(1, dtype=torch.int32)
    for r, (start, count, length) in enumerate(
        zip(query_start.tolist(), query_len.tolist(), context_len.tolist(), strict=True)
    ):
        for i in range(count):
            at = slice(start + i, start + i + 1)
            y[at] = extend_attention_cpu(
                q[at].clone(), k_cache, v_cache, page_table[r : r + 1], 0 * one, one,
                one * (length - count + i + 1), sinks, **attrs,
            )  # fmt: skip
    return y
