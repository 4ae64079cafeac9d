"""Paged KV caches of 8 and 4 bits with a scale for each token and head: writing and attending.

What paged.py says holds here, too. Beside the two caches a layer has a third tensor of fp16, ``scales[P,S,G,N]``:
the key's scale and the value's (N = 2), or with 4 bits scale and offset of the key, then of the value (N = 4). They
are written with the numbers, so a token's bits depend on that token alone.

* 8 bits (int8, float8_e4m3fn): ``x = q * scale``, ``scale`` the largest magnitude over 127, or over 448.
* 4 bits: ``x = (c - 8) * scale + offset`` with ``c`` in 0 .. 15, ``scale`` a 15th of the range, ``offset`` 8 steps
  above the least. Feature 2i is in the low half of byte i, feature 2i + 1 in the high one.

Numbers are rounded to nearest, ties to even, with the scales as they are stored. A head with a number that is not
finite, or with a scale or offset beyond fp16, has NaN for scales: what reads it is not finite. One whose scale is
below fp16's least is its offset, or zeros.

    T tokens, R rows, H query heads, G KV heads, D head size, B pages of a row at most
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from makeready.kernels.attention.paged import decode_attention, extend_attention
from makeready.kernels.contract import ANY, Tolerance, contract
from makeready.kernels.norm import rms_norm
from makeready.kernels.quantize import FP8_MAX
from makeready.kernels.rope import rotate

_CACHE = (
    "k_cache{mark}[P,S,kv_heads,cdiv(head_dim*bits,8)]:C v_cache{mark}[P,S,kv_heads,cdiv(head_dim*bits,8)]:C "
    "scales{mark}[P,S,kv_heads,cdiv(16,bits)]:float16"
)
_WIDTH = "*kv_heads*cdiv(head_dim*bits,8)"
_READ, _WRITE = (
    {"k_cache": n + _WIDTH, "v_cache": n + _WIDTH, "scales": f"{n}*kv_heads*cdiv(16,bits)"}
    for n in ("R*context", "T")
)
_EXTEND = (
    f"q[T,heads*head_dim]:A {_CACHE.format(mark='')} page_table[R,B]:int32 "
    "query_start[R]:int32 query_len[R]:int32 context_len[R]:int32 sinks?[heads]:float32 -> y[T,heads*head_dim]:A"
)
# A number that is rounded the other way is a step away, of 15 where there are 4 bits; scales are as exact as keys.
_WRITTEN = Tolerance(float16=2e-2, uint8=6e-2)


def quantize_heads(x_TGD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers ``[T, G, D]``, or ``[T, G, D / 2]`` of uint8, and their scales ``[T, G, 1]`` or ``[T, G, 2]`` of fp16.

    All is computed in fp32, whatever ``x`` is. ``dtype``: the cache's; of floats wider than 8 bits numbers are not
    rounded.
    """
    x_TGD = x_TGD.float()
    if dtype == torch.uint8:
        least, most = x_TGD.amin(-1, keepdim=True), x_TGD.amax(-1, keepdim=True)
        step = ((most - least) / 15).half()
        numbers = torch.cat((step, (least + 8 * step.float()).half()), -1)
    else:
        largest = FP8_MAX if dtype.is_floating_point else 127.0
        numbers = (x_TGD.abs().amax(-1, keepdim=True) / largest).half()
    finite = numbers.isfinite().all(-1, keepdim=True)
    numbers = numbers.where(finite, torch.nan)
    scale = numbers[..., :1].float()
    steps = (x_TGD - numbers[..., 1:].float() if dtype == torch.uint8 else x_TGD) / scale
    steps = steps.where(finite & (scale > 0), 0.0)
    if dtype.is_floating_point:
        return steps.clamp(-FP8_MAX, FP8_MAX).to(dtype), numbers
    if dtype == torch.int8:
        return steps.round().clamp(-127, 127).to(dtype), numbers
    codes = (steps.round() + 8).clamp(0, 15).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, numbers


def widen_heads(cache: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[..., G, D]`` of ``dtype`` from numbers and the scales that :func:`quantize_heads` gave with them."""
    scale = scales[..., :1].to(dtype)
    if cache.dtype != torch.uint8:
        return cache.to(dtype) * scale
    codes = torch.stack((cache & 15, cache >> 4), -1).flatten(-2)
    return (codes.to(dtype) - 8) * scale + scales[..., 1:].to(dtype)


def widen_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    context_len: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values ``[pages, S, G, D]`` of the pages that hold rows' contexts, and a page table for them."""
    size, half = k_cache.shape[1], scales.shape[-1] // 2
    held = [-(-n // size) for n in context_len.tolist()]
    pages = torch.cat([row[:n] for row, n in zip(page_table, held, strict=True)]).long()
    table = torch.zeros_like(page_table)
    for r, n in enumerate(held):
        table[r, :n] = torch.arange(n) + sum(held[:r])
    found = scales[pages]
    k = widen_heads(k_cache[pages], found[..., :half], dtype)
    return k, widen_heads(v_cache[pages], found[..., half:], dtype), table


def _store(
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    kv_slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    at, numbers = kv_slot.long(), []
    for cache, x_TGD in ((k_cache, k_TGD), (v_cache, v_TGD)):
        cache.flatten(0, 1)[at], of_heads = quantize_heads(x_TGD, cache.dtype)
        numbers.append(of_heads)
    scales.flatten(0, 1)[at] = torch.cat(numbers, -1).to(scales.dtype)


@contract(
    f"k[T,kv_heads*head_dim]:A v[T,kv_heads*head_dim]:A kv_slot[T]:int32 {_CACHE.format(mark='!')} -> ",
    tolerance=_WRITTEN,
    traffic=_WRITE,
)
def kv_write_scaled(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    *,
    kv_heads: int,
    head_dim: int,
    bits: int,
) -> None:
    """Store token t's key and value at ``kv_slot[t]`` (page * S + slot) as numbers of ``bits`` with scales."""
    k_TGD, v_TGD = (x.unflatten(-1, (kv_heads, head_dim)) for x in (k, v))
    _store(k_TGD, v_TGD, kv_slot, k_cache, v_cache, scales)


@contract(
    "qkv[T,(heads+2*kv_heads)*head_dim]:A rows[T,Q]:float32 q_norm?[head_dim]:W k_norm?[head_dim]:W "
    f"kv_slot[T]:int32 {_CACHE.format(mark='!')} -> q[T,heads*head_dim]:A",
    tolerance=_WRITTEN,
    flops="8*T*(heads+kv_heads)*head_dim",
    traffic=_WRITE,
)
def norm_rope_kv_write_scaled(
    qkv: torch.Tensor,
    rows: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    kv_slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: int,
    eps: float,
    offset: float = 0.0,
) -> torch.Tensor:
    """:func:`~.paged.norm_rope_kv_write` into a cache with scales."""
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = (rms_norm(x, w, eps=eps, offset=offset) for x, w in ((q, q_norm), (k, k_norm)))
    _store(rotate(k, rows), v, kv_slot, k_cache, v_cache, scales)
    return rotate(q, rows).flatten(1)


@contract(
    _EXTEND,
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops="4*T*context*heads*head_dim",
    rate="q",
    traffic=_READ,
)
def extend_attention_scaled(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """:func:`~.paged.extend_attention` over a cache with scales."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v, table = widen_pages(k_cache, v_cache, scales, page_table, context_len, wide)
    return extend_attention.reference(
        q, k, v, table, query_start, query_len, context_len, sinks,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=window,
    )  # fmt: skip


@contract(
    f"q[R,heads*head_dim]:A {_CACHE.format(mark='')} page_table[R,B]:int32 "
    "context_len[R]:int32 sinks?[heads]:float32 -> y[R,heads*head_dim]:A",
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops="4*R*context*heads*head_dim",
    rate="q",
    traffic=_READ,
)
def decode_attention_scaled(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """:func:`~.paged.decode_attention` over a cache with scales."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v, table = widen_pages(k_cache, v_cache, scales, page_table, context_len, wide)
    return decode_attention.reference(
        q, k, v, table, context_len, sinks,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=window,
    )  # fmt: skip


@contract(
    _EXTEND,
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops="4*T*context*heads*head_dim",
    rate="q",
    traffic=_READ,
)
def verify_attention_scaled(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """:func:`~.paged.verify_attention` over a cache with scales."""
    return extend_attention_scaled.reference(
        q, k_cache, v_cache, scales, page_table, query_start, query_len, context_len, sinks,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, bits=bits, scale=scale, window=window,
    )  # fmt: skip


def _extend(program: Any, call: Any) -> list[Any]:
    return [replace(call, op="extend_attention_scaled")]


def _verify(program: Any, call: Any) -> list[Any]:
    return [replace(call, op="verify_attention_scaled")]


def _decode(program: Any, call: Any) -> list[Any]:
    kept = {k: v for k, v in call.operands.items() if k not in ("query_start", "query_len")}
    return [replace(call, op="decode_attention_scaled", operands=kept)]


@contract(
    _EXTEND,
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops="4*T*context*heads*head_dim",
    rate="q",
    traffic=_READ,
    expands={"decode": _decode, "verify": _verify, ANY: _extend},
)
def paged_attention_scaled(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Attention over a cache with scales as models call it, in steps of every kind."""
    return extend_attention_scaled.reference(
        q, k_cache, v_cache, scales, page_table, query_start, query_len, context_len, sinks,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, bits=bits, scale=scale, window=window,
    )  # fmt: skip
