"""Caches of latents in 8 bits with a scale for each token: writing and attending.

What mla.py says holds here, too. The ``rank`` normed values of a token are numbers of 8 bits, ``cache[P,S,rank]`` of
int8 or e4m3, with one scale in fp32, ``scales[P,S,1]``: their largest magnitude over 127, or over 448. The ``rope``
rotated features stay in the activations' dtype, ``rope_cache[P,S,rope]``, as in FlashMLA's 8-bit layout.

Numbers are rounded to nearest, ties to even. A token with a value that is not finite has NaN for its scale:
what reads it is not finite. All zeros have the scale 0.

    letters as in :mod:`~makeready.kernels.attention.mla`
"""

from __future__ import annotations

from typing import Any

import torch

from makeready.kernels.attention import mla
from makeready.kernels.attention.mla_attention import absorbed, merged
from makeready.kernels.contract import ANY, INVARIANT, Tolerance, contract
from makeready.kernels.norm import rms_norm
from makeready.kernels.quantize import FP8_MAX

_BF16 = Tolerance(bfloat16=1.5e-2)
_CACHE = "cache{mark}[P,S,rank]:C rope_cache{mark}[P,S,rope]:A scales{mark}[P,S,1]:float32"
_ROWS = "query_start[R]:int32 query_len[R]:int32 context_len[R]:int32"
_PAGED = f"{_CACHE.format(mark='')} page_table[R,B]:int32"
_READ, _WRITTEN = (
    {"cache": f"{n}*rank", "rope_cache": f"{n}*rope", "scales": n} for n in ("R*context", "T")
)  # fmt: skip


def quantize_latents(x_TL: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers ``[T, L]`` and scales ``[T, 1]`` of fp32, computed in fp32, whatever ``x`` is.

    ``dtype``: the cache's; of floats wider than 8 bits numbers are not rounded.
    """
    x_TL = x_TL.float()
    largest = FP8_MAX if dtype.is_floating_point else 127.0
    scale = x_TL.abs().amax(-1, keepdim=True) / largest
    finite = scale.isfinite()
    scale = scale.where(finite, torch.nan)
    steps = (x_TL / scale).where(finite & (scale > 0), 0.0)
    if not dtype.is_floating_point:
        steps = steps.round()
    return steps.clamp(-largest, largest).to(dtype), scale


def widen_latents(
    cache: torch.Tensor,
    rope_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    context_len: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents ``[pages, S, rank + rope]`` of the pages that hold rows' contexts, and a page table for them."""
    size = cache.shape[1]
    held = [-(-n // size) for n in context_len.tolist()]
    pages = torch.cat([row[:n] for row, n in zip(page_table, held, strict=True)]).long()
    table = torch.zeros_like(page_table)
    for r, n in enumerate(held):
        table[r, :n] = torch.arange(n) + sum(held[:r])
    wide = cache[pages].to(dtype) * scales[pages].to(dtype)
    return torch.cat((wide, rope_cache[pages].to(dtype)), -1), table


@contract(
    "kv[T,rank+rope]:A rows[T,rope]:float32 weight[rank]:W kv_slot[T]:int32 "
    f"{_CACHE.format(mark='!')} -> latent[T,rank+rope]:A",
    tolerance=Tolerance(float32=5e-3),  # scales are of latents that were rounded to 16 bits
    flops="10*T*(rank+rope)",
    traffic=_WRITTEN,
)
def mla_write_scaled(
    kv: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    kv_slot: torch.Tensor,
    cache: torch.Tensor,
    rope_cache: torch.Tensor,
    scales: torch.Tensor,
    *,
    rank: int,
    rope: int,
    eps: float,
    interleaved: bool,
) -> torch.Tensor:
    """:func:`~.mla.mla_write` into a cache with scales; what it gives is not rounded to 8 bits."""
    normed = rms_norm(kv[:, :rank], weight, eps=eps)
    turned = mla.rotate_pairs(kv[:, rank:].unsqueeze(1), rows, interleaved=interleaved).squeeze(1)
    at = kv_slot.long()
    cache.flatten(0, 1)[at], of_tokens = quantize_latents(normed, cache.dtype)
    scales.flatten(0, 1)[at] = of_tokens.to(scales.dtype)
    rope_cache.flatten(0, 1)[at] = turned.to(rope_cache.dtype)
    return torch.cat((normed, turned), dim=-1)


@contract(
    f"q[T,heads*(rank+rope)]:A {_PAGED} {_ROWS} -> y[T,heads*rank]:A log_sum[T,heads]:float32",
    tolerance=_BF16,
    flops="2*T*context*heads*(2*rank+rope)",
    rate="q",
    traffic=_READ,
)
def mla_extend_attention_scaled(
    q: torch.Tensor,
    cache: torch.Tensor,
    rope_cache: torch.Tensor,
    scales: torch.Tensor,
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
    """:func:`~.mla.mla_extend_attention` over a cache with scales."""
    wide = torch.promote_types(q.dtype, torch.float32)
    latents, table = widen_latents(cache, rope_cache, scales, page_table, context_len, wide)
    return mla.mla_extend_attention.reference(
        q, latents, table, query_start, query_len, context_len,
        heads=heads, rank=rank, rope=rope, scale=scale, own=own,
    )  # fmt: skip


@contract(
    f"q[R,heads*(rank+rope)]:A {_PAGED} context_len[R]:int32 -> y[R,heads*rank]:A",
    tolerance=_BF16,
    flops="2*R*context*heads*(2*rank+rope)",
    rate="q",
    traffic=_READ,
)
def mla_decode_attention_scaled(
    q: torch.Tensor,
    cache: torch.Tensor,
    rope_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    context_len: torch.Tensor,
    *,
    heads: int,
    rank: int,
    rope: int,
    scale: float,
) -> torch.Tensor:
    """:func:`~.mla.mla_decode_attention` over a cache with scales."""
    wide = torch.promote_types(q.dtype, torch.float32)
    latents, table = widen_latents(cache, rope_cache, scales, page_table, context_len, wide)
    return mla.mla_decode_attention.reference(
        q, latents, table, context_len, heads=heads, rank=rank, rope=rope, scale=scale
    )


@contract(
    "q[T,heads*(nope+rope)]:A latent[T,rank+rope]:A kv_b[heads*(nope+value),rank]:A rows[T,rope]:float32 "
    f"{_PAGED} {_ROWS} -> y[T,heads*value]:A",
    tolerance=_BF16,
    flops="2*T*context*heads*(2*rank+rope)",
    rate="q",
    traffic=_READ,
    expands={
        "decode": absorbed("mla_decode_attention_scaled"),
        INVARIANT: absorbed("mla_extend_attention_scaled"),
        ANY: merged("mla_extend_attention_scaled"),
    },
)
def mla_attention_scaled(
    q: torch.Tensor,
    latent: torch.Tensor,
    kv_b: torch.Tensor,
    rows: torch.Tensor,
    cache: torch.Tensor,
    rope_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    *,
    heads: int,
    nope: int,
    rope: int,
    value: int,
    rank: int,
    scale: float,
    interleaved: bool,
) -> torch.Tensor:
    """:func:`~.mla_attention.mla_attention` over a cache with scales."""
    by: dict[str, Any] = {"heads": heads, "nope": nope, "value": value, "rank": rank}
    queries = mla.mla_absorb.reference(q, rows, kv_b, rope=rope, interleaved=interleaved, **by)
    latents, _ = mla_extend_attention_scaled.reference(
        queries, cache, rope_cache, scales, page_table, query_start, query_len, context_len,
        heads=heads, rank=rank, rope=rope, scale=scale, own=True,
    )  # fmt: skip
    return mla.mla_values.reference(latents, kv_b, **by)
