"""Paged KV caches with scales on the CPU: compiled, or by the kernels of caches without scales over widened pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels import native
from makeready.kernels.attention.paged_cpu import (
    decode_attention_cpu,
    extend_attention_cpu,
    extend_attention_queries,
)
from makeready.kernels.attention.scaled import (
    decode_attention_scaled,
    extend_attention_scaled,
    kv_write_scaled,
    norm_rope_kv_write_scaled,
    verify_attention_scaled,
    widen_pages,
)
from makeready.kernels.contract import Contract
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(kv_write_scaled, Contract)
assert isinstance(norm_rope_kv_write_scaled, Contract)

# Numbers of csrc/cached.h.
CODES = {torch.int8: 3, torch.float8_e4m3fn: 4, torch.uint8: 5}


def _activations_float32(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return all(specs[name].dtype == "float32" for name in ("qkv", "q_norm", "k_norm", "q") if name in specs)


def _fits(attrs: Mapping[str, Any]) -> bool:
    group = attrs["heads"] // attrs["kv_heads"]
    return attrs["head_dim"] <= native.MAX_HEAD and group <= native.MAX_GROUP


def _bind_write(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (qkv, rows, q_norm, k_norm, kv_slot, k_cache, v_cache, scales), (q,) = operands, results
    if not _fits(attrs):
        return None
    if q_norm is None or k_norm is None:
        q_norm = k_norm = None
    return native.prepare(
        "norm_rope_kv_write", qkv, qkv.stride(0), rows, rows.stride(0), q_norm, k_norm, kv_slot, k_cache, v_cache,
        scales, q, q.stride(0), len(qkv), attrs["heads"], attrs["kv_heads"], attrs["head_dim"], rows.shape[-1],
        CODES[k_cache.dtype], float(attrs["eps"]), float(attrs.get("offset", 0)),
        long=len(qkv) > native.MANY_TOKENS,
    )  # fmt: skip


def _bind_attention(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any], *, tiled: bool
) -> Callable[[], None] | None:
    q, k_cache, v_cache, scales, page_table, query_start, query_len, context_len, sinks = operands
    (y,) = results
    if not _fits(attrs):
        return None
    return native.prepare(
        "attention", q, q.stride(0), k_cache, v_cache, scales, page_table, page_table.stride(0), query_start,
        query_len, context_len, sinks, y, y.stride(0), len(page_table), len(q), attrs["heads"], attrs["kv_heads"],
        attrs["head_dim"], k_cache.shape[1], attrs["window"], CODES[k_cache.dtype], float(attrs["scale"]),
        tiled, long=len(q) > native.MANY_TOKENS,
    )  # fmt: skip


def _bind_decode(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    *before, context_len, sinks = operands
    return _bind_attention((*before, None, None, context_len, sinks), results, attrs, tiled=False)


def _bind_extend(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    return _bind_attention(operands, results, attrs, tiled=attrs["head_dim"] <= native.MAX_TILED)


def _bind_queries(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    return _bind_attention(operands, results, attrs, tiled=False)


# Scales are a token's own, and numbers are rounded one by one.
kernel(kv_write_scaled, "rows", target="cpu", invariant=True, ordinary=False)(kv_write_scaled.reference)


@kernel(
    norm_rope_kv_write_scaled,
    "rows",
    target="cpu",
    invariant=True,
    applies=_activations_float32,
    bind=_bind_write,
)
def norm_rope_kv_write_scaled_rows(
    qkv: torch.Tensor,
    rows: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    kv_slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    **attrs: Any,
) -> torch.Tensor:
    """Every token by itself, compiled for any number of them."""
    reference = norm_rope_kv_write_scaled.reference
    made = [
        reference(x.clone(), row.clone(), q_norm, k_norm, slot, k_cache, v_cache, scales, **attrs)
        for x, row, slot in zip(qkv.split(1), rows.split(1), kv_slot.split(1), strict=True)
    ]
    return torch.cat(made)


@kernel(decode_attention_scaled, "widened", target="cpu", applies=_activations_float32, bind=_bind_decode)
def decode_attention_scaled_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    page_table: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    bits: int,
    **attrs: Any,
) -> torch.Tensor:
    """All rows at once, behind a copy of their pages in fp32."""
    k, v, table = widen_pages(k_cache, v_cache, scales, page_table, context_len, q.dtype)
    return decode_attention_cpu(q, k, v, table, context_len, sinks, **attrs)


@kernel(verify_attention_scaled, "widened", target="cpu", applies=_activations_float32, bind=_bind_extend)
@kernel(extend_attention_scaled, "widened", target="cpu", applies=_activations_float32, bind=_bind_extend)
def extend_attention_scaled_cpu(
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
    bits: int,
    **attrs: Any,
) -> torch.Tensor:
    """Row by row, behind a copy of their pages in fp32."""
    k, v, table = widen_pages(k_cache, v_cache, scales, page_table, context_len, q.dtype)
    return extend_attention_cpu(q, k, v, table, query_start, query_len, context_len, sinks, **attrs)


@kernel(
    extend_attention_scaled,
    "queries",
    target="cpu",
    invariant=True,
    ordinary=False,
    applies=_activations_float32,
    bind=_bind_queries,
)
def extend_attention_scaled_queries(
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
    bits: int,
    **attrs: Any,
) -> torch.Tensor:
    """Every query by itself over the keys that it sees, compiled or as a row of its own."""
    k, v, table = widen_pages(k_cache, v_cache, scales, page_table, context_len, q.dtype)
    return extend_attention_queries(q, k, v, table, query_start, query_len, context_len, sinks, **attrs)
