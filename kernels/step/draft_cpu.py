"""Drafts on the CPU: in C, see csrc/cpu_ops.c."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels import native
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.step.draft import accept_drafts, draft_ngram


def _bind_draft(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    token_ids, row_slot, _, _, _, _, _, length, history = operands
    sizes = (len(token_ids), len(row_slot), len(length) - 1, history.stride(0))
    return native.prepare("draft_ngram", *operands, *results, *sizes, attrs["ngram_min"], attrs["ngram_max"])


@kernel(draft_ngram, "rows", target="cpu", invariant=True, bind=_bind_draft)
def draft_ngram_cpu(*operands: torch.Tensor, ngram_min: int, ngram_max: int) -> tuple[torch.Tensor, ...]:
    """The reference."""
    return draft_ngram.reference(*operands, ngram_min=ngram_min, ngram_max=ngram_max)


def _bind_accept(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    row_slot, length = operands[2], operands[6]
    return native.prepare("accept_drafts", *operands, *results, len(row_slot), len(length) - 1)


@kernel(accept_drafts, "rows", target="cpu", invariant=True, bind=_bind_accept)
def accept_drafts_cpu(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The reference."""
    return accept_drafts.reference(*operands)
