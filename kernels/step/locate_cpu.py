"""Where a step stands in its sequences, on the CPU: in C, see csrc/cpu_ops.c."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels import native
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.step.locate import find_pages, locate


def _bind_locate(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    token_ids, row_slot, _, _, _, length, history = operands
    sizes = (len(token_ids), len(row_slot), len(length) - 1, history.stride(0))
    return native.prepare("locate", *operands, *results, *sizes)


@kernel(locate, "rows", target="cpu", invariant=True, bind=_bind_locate)
def locate_cpu(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The reference."""
    return locate.reference(*operands)


def _bind_find_pages(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    positions, row_slot, _, _, _, _, grow_page, pages = operands
    sizes = (len(positions), len(row_slot), grow_page.shape[1], len(pages) - 1, pages.shape[1])
    return native.prepare("find_pages", *operands, *results, *sizes, attrs["page_size"])


@kernel(find_pages, "rows", target="cpu", invariant=True, bind=_bind_find_pages)
def find_pages_cpu(*operands: torch.Tensor, page_size: int) -> tuple[torch.Tensor, ...]:
    """The reference."""
    return find_pages.reference(*operands, page_size=page_size)
