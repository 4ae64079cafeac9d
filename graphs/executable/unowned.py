"""What on a device belongs to no sequence: a step may neither read it nor depend on it.

Tests fill it with NaN patterns and run a step again; see ``poison`` of the executables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import DEVICE
from makeready.kernels.spec import DTYPE_BYTES


@dataclass(frozen=True)
class Held:
    """What a sequence has on the device between two steps.

    Attributes:
        slot: where it lives.
        pages: its page list, pages that the next step fills included.
        tokens: how many lie in the cache.
        state: block of each state group that holds what these tokens left; 0 where there is none.
    """

    slot: int
    pages: Sequence[int]
    tokens: int
    state: int = 0


def unowned(plan: Plan, blocks: Mapping[str, int], held: Iterable[Held]) -> Iterator[tuple[str, int, int]]:
    """Byte ranges ``start:stop`` of slot fields and cache tensors, by name, that are nobody's.

    These are: every entry of slots that no sequence lives in (the null slot among them), page lists and
    histories beyond what sequences have, pages that nobody holds, and places of a page that no token was
    written to; states that nobody holds, but for block 0, with which sequences begin.

    Args:
        blocks: of every cache group by its name, block 0 included.
    """
    held = tuple(held)
    kept = {one.slot: {"pages": len(one.pages), "history": one.tokens + 1} for one in held}
    for field in plan.slots:
        slots, *rest = field.spec.at({})
        entry = DTYPE_BYTES[field.spec.dtype] * math.prod(rest[1:])
        row = entry * (rest[0] if rest else 1)
        for slot in range(slots):
            if slot not in kept:
                yield field.name, slot * row, (slot + 1) * row
            elif field.keeper == DEVICE and field.name in kept[slot]:
                yield field.name, slot * row + kept[slot][field.name] * entry, (slot + 1) * row
    filled = _filled(held, plan.kv.page_size)
    states = {0: 1, **{one.state: 1 for one in held}}  # whole blocks
    for group in plan.kv.groups:
        for part in group.parts:
            paged = group.unit is not None
            token = part.page_bytes // part.page_shape[0] if paged else part.page_bytes
            free = _free(filled if paged else states, blocks[group.name], part.page_bytes, token)
            yield from ((part.name, *span) for span in free)


def _filled(held: Iterable[Held], page_size: int) -> Mapping[int, int]:
    """Tokens that lie in each page; sequences may share pages."""
    filled: dict[int, int] = {}
    for one in held:
        for at, page in enumerate(one.pages):
            tokens = min(max(one.tokens - at * page_size, 0), page_size)
            filled[int(page)] = max(filled.get(int(page), 0), tokens)
    return filled


def _free(filled: Mapping[int, int], pages: int, page: int, token: int) -> Iterator[tuple[int, int]]:
    """Bytes behind the last token of each page, those of pages in a row as one range."""
    start = 0
    for at in range(pages):
        if filled.get(at):
            if start < at * page:
                yield start, at * page
            start = at * page + filled[at] * token
    if start < pages * page:
        yield start, pages * page
