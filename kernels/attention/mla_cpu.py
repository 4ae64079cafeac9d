"""Latent attention on the CPU in deterministic plans: every token by itself, as the references compute it."""

from __future__ import annotations

from typing import Any

import torch

from makeready.kernels.attention.mla import mla_extend_attention, mla_write
from makeready.kernels.attention.mla_scaled import mla_extend_attention_scaled, mla_write_scaled
from makeready.kernels.contract import Contract
from makeready.kernels.registry import kernel

assert isinstance(mla_write, Contract)
assert isinstance(mla_extend_attention, Contract)
assert isinstance(mla_write_scaled, Contract)
assert isinstance(mla_extend_attention_scaled, Contract)


def _by_rows(op: Contract) -> None:
    @kernel(op, "rows", target="cpu", invariant=True, ordinary=False)
    def write_rows(
        kv: torch.Tensor,
        rows: torch.Tensor,
        weight: torch.Tensor,
        kv_slot: torch.Tensor,
        *cache: torch.Tensor,
        **attrs: Any,
    ) -> torch.Tensor:
        """The reference for one token after the other."""
        tokens = zip(kv.split(1), rows.split(1), kv_slot.split(1), strict=True)
        return torch.cat(
            [op.reference(x.clone(), row.clone(), weight, slot, *cache, **attrs) for x, row, slot in tokens]
        )


def _by_queries(op: Contract) -> None:
    @kernel(op, "queries", target="cpu", invariant=True, ordinary=False)
    def attention_queries(
        q: torch.Tensor, *others: torch.Tensor, heads: int, rank: int, own: bool, **attrs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference for one query after the other, over the keys that it sees."""
        *cache, page_table, query_start, query_len, context_len = others
        y = q.new_zeros(len(q), heads * rank)
        log_sum = q.new_full((len(q), heads), float("-inf"), dtype=torch.float32)
        one = torch.ones(1, dtype=torch.int32)
        rows = zip(query_start.tolist(), query_len.tolist(), context_len.tolist(), strict=True)
        for r, (start, count, length) in enumerate(rows):
            for i in range(count):
                at = slice(start + i, start + i + 1)
                seen = length - count + (i if own else 0) + 1
                y[at], log_sum[at] = op.reference(
                    q[at].clone(), *cache, page_table[r : r + 1], 0 * one, one, one * seen,
                    heads=heads, rank=rank, own=own, **attrs,
                )  # fmt: skip
        return y, log_sum


for _op in (mla_write, mla_write_scaled):
    _by_rows(_op)
for _op in (mla_extend_attention, mla_extend_attention_scaled):
    _by_queries(_op)
