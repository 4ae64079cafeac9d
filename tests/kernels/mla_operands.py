"""Operands of latent attention for tests of kernels: NaN in every slot, row and token that is nobody's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from case import NAN, Random, in_columns, int32

from makeready.kernels.attention.mla_scaled import quantize_latents

Tensors = dict[str, torch.Tensor]
Sizes = tuple[int, int, int, int, int]  # heads, nope, rope, value, rank

V2_LITE: Sizes = (16, 128, 64, 128, 512)
V3: Sizes = (128, 128, 64, 128, 512)


def attrs_of(sizes: Sizes, *names: str, **further: Any) -> dict[str, Any]:
    """Attributes ``names`` of a call, as far as sizes give them, and others."""
    heads, nope, rope, value, rank = sizes
    known = {"heads": heads, "nope": nope, "rope": rope, "value": value, "rank": rank}
    known["scale"] = (nope + rope) ** -0.5
    return {name: known[name] for name in names} | further


def paged_latents(lengths: Sequence[int], page: int, width: int, dtype: str, seed: int = 0) -> Tensors:
    """Cache and page table of rows of ``lengths`` tokens; pages lie in any order, page 0 and the rest hold NaN."""
    random = Random(seed)
    needed = [-(-length // page) for length in lengths]
    order = (1 + random.permutation(sum(needed))).tolist()
    cache = torch.full((1 + sum(needed), page, width), NAN).to(getattr(torch, dtype))
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    for r, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine, order = order[:count], order[count:]
        table[r, :count] = int32(mine)
        latents = torch.full((count * page, width), NAN).to(cache.dtype)
        latents[:length] = random.normal(length, width, dtype=dtype)
        cache[torch.tensor(mine, dtype=torch.int64)] = latents.view(count, page, width)
    return {"cache": cache, "page_table": table}


def scaled_latents(cache: torch.Tensor, rank: int, dtype: str) -> Tensors:
    """A cache as one with scales; what was NaN has NaN for scale and rotated features, and the worst numbers."""
    numbers, scales = quantize_latents(cache[..., :rank].flatten(0, 1), getattr(torch, dtype))
    numbers.view(torch.uint8)[scales.isnan().squeeze(-1)] = 0x7F if numbers.dtype.is_floating_point else 0x80
    shape = cache.shape[:2]
    return {
        "cache": numbers.view(*shape, rank),
        "rope_cache": cache[..., rank:].contiguous(),
        "scales": scales.view(*shape, 1),
    }


def step_rows(rows: Sequence[tuple[int, int]], *, before: int = 2) -> Tensors:
    """Fields of rows of (queries, context); tokens of nobody are before the first."""
    counts = [queries for queries, _ in rows]
    starts = [before + sum(counts[:r]) if n else 0 for r, n in enumerate(counts)]
    return {
        "query_start": int32(starts),
        "query_len": int32(counts),
        "context_len": int32([context for _, context in rows]),
    }


def of_tokens(
    rows: Sequence[tuple[int, int]], width: int, dtype: str, seed: int = 0, *, before: int = 2
) -> Any:
    """``[T, width]``: normals for the rows' tokens, NaN for ``before`` of nobody and three behind."""
    count = sum(queries for queries, _ in rows)
    x = torch.full((before + count + 3, width), NAN).to(getattr(torch, dtype))
    x[before : before + count] = Random(seed).normal(count, width, dtype=dtype)
    return x


def write_operands(sizes: Sizes, tokens: int, page: int, dtype: str, cache: str) -> Tensors:
    """Of ``mla_write``; the last token is padding, which writes to page 0."""
    _, _, rope, _, rank = sizes
    random = Random(tokens)
    slots = page + random.permutation(tokens + 3 * page)[:tokens]
    if tokens > 1:
        slots[-1] = 0
    return {
        "kv": in_columns(random.normal(tokens, rank + rope, dtype=dtype, scale=2)),
        "rows": random.rotary(tokens, rope),
        "weight": random.uniform(rank, dtype=dtype),
        "kv_slot": slots.to(torch.int32),
        "cache": random.normal(5 + tokens // page, page, rank + rope, dtype=cache),
    }


def query_operands(sizes: Sizes, tokens: int, dtype: str) -> Tensors:
    """Of ``mla_rope``; queries are columns of something wider."""
    heads, nope, rope, _, _ = sizes
    random = Random(tokens)
    q = in_columns(random.normal(tokens, heads * (nope + rope), dtype=dtype), before=8, after=8)
    return {"q": q, "rows": random.rotary(tokens, rope)}


def up_projection(sizes: Sizes, dtype: str) -> torch.Tensor:
    """``kv_b``."""
    heads, nope, _, value, rank = sizes
    return Random(3).normal(heads * (nope + value), rank, dtype=dtype, scale=rank**-0.5)


def merge_operands(heads: int, value: int, tokens: int, dtype: str) -> Tensors:
    """Of ``merge_attention``; parts that saw no key are NaN."""
    random = Random(tokens)
    made = {name: random.normal(tokens, heads * value, dtype=dtype) for name in "xy"}
    made |= {f"{name}_log_sum": random.normal(tokens, heads, scale=4) for name in "xy"}
    for at, name in enumerate("xyx"):
        none = torch.arange(tokens * heads).view(tokens, heads) % 5 == (at + 1) // 2 * 2
        made[f"{name}_log_sum"][none] = -torch.inf
        made[name].unflatten(-1, (heads, value))[none] = NAN
    return made
