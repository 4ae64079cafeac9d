"""Embeddings and rotary rows on the CPU: the references, written where the result belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels.embedding import embedding
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.rope import rope_rows


def _bind_embedding(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None]:
    (ids, weight), (x,) = operands, results

    def call() -> None:
        torch.index_select(weight, 0, ids, out=x)

    def call_converting() -> None:
        x.copy_(weight.index_select(0, ids))

    return call if x.dtype == weight.dtype else call_converting


@kernel(embedding, "in_place", target="cpu", invariant=True, bind=_bind_embedding)
def embedding_cpu(ids: torch.Tensor, weight: torch.Tensor, *, out_dtype: str = "") -> torch.Tensor:
    """The reference."""
    return embedding.reference(ids, weight, out_dtype=out_dtype)


def _bind_rope_rows(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None]:
    (positions, table), (rows,) = operands, results

    def call() -> None:
        torch.index_select(table, 0, positions, out=rows)

    return call


@kernel(rope_rows, "in_place", target="cpu", invariant=True, bind=_bind_rope_rows)
def rope_rows_cpu(positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The reference."""
    return rope_rows.reference(positions, table)
