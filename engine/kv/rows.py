"""What rows hold of windows and states, by slot.

Neither ever runs out for a row that runs: a row counts from its admission on as the most blocks that it may need
to get on by a token, and a sequence is admitted only where all these together are there. What a row holds
beyond that, for a long chunk, is of what is left.

    S slots   P pages of a row
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from makeready.engine.kv.counted import Counted
from makeready.engine.kv.radix import PrefixCache


def take(counted: Counted, cache: PrefixCache | None, count: int) -> list[int]:
    """Blocks for a row, if need be those that nobody but the tree has."""
    pool = counted.pool
    if cache is not None and count > pool.free:
        cache.give_up(counted, count - pool.free)
    return pool.take(count)


class WindowRows:
    """Pages of a group with a window: entries ``first_S:end_S`` of a row's list, all others 0.

    Args:
        gain: tokens that a row can gain in a step.
    """

    def __init__(
        self, counted: Counted, cache: PrefixCache | None, pages_SP: np.ndarray, page_size: int, gain: int
    ) -> None:
        self.counted = counted
        self.pages_SP = pages_SP
        self.first_S, self.end_S, self._most_S = np.zeros((3, len(pages_SP)), np.int64)
        self._cache = cache
        self._size = page_size
        # The tail, the page that is being filled, and what a step adds before the one before it is read.
        self._most = counted.tail + 2 + (2 * gain - 3) // page_size

    def most(self, pages: int) -> int:
        """What a row counts as that comes to this number of pages."""
        return min(self._most, pages)

    def fits(self, pages: int, leaving: Collection[int] = ()) -> bool:
        """Whether one more such row can be admitted, once those in the ``leaving`` slots are gone."""
        taken = np.maximum(self._most_S, self.end_S - self.first_S)
        taken[list(leaving)] = 0
        return int(taken.sum()) + self.most(pages) <= self.counted.pool.usable

    def enter(self, slot: int, tail: list[int], end: int, pages: int) -> None:
        """A row begins behind ``end`` cached pages, of which it holds the ``tail``."""
        self._most_S[slot] = self.most(pages)
        self.first_S[slot], self.end_S[slot] = end - len(tail), end
        self.pages_SP[slot, end - len(tail) : end] = tail

    def cover(self, slot: int, pages: int) -> int:
        """Take further pages, so that a row has its first ``pages`` or as many as are there; how many it has."""
        first, end = int(self.first_S[slot]), int(self.end_S[slot])
        if pages > end:
            taken = np.maximum(self._most_S, self.end_S - self.first_S)
            room = self.counted.pool.usable - int(taken.sum() - taken[slot])
            more = min(pages, first + room) - end
            self.pages_SP[slot, end : end + more] = take(self.counted, self._cache, more)
            self.end_S[slot] = end = end + more
        return end

    def slide(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Free what no token behind so many reads, nor one behind the last page border before."""
        keep = np.minimum(lengths // self._size - self.counted.tail, self.end_S[slots])
        for slot, stop in zip(slots.tolist(), keep.tolist(), strict=True):
            for at in range(int(self.first_S[slot]), stop):
                self.counted.free(int(self.pages_SP[slot, at]))
                self.pages_SP[slot, at] = 0
                self.first_S[slot] = at + 1

    def leave(self, slot: int) -> None:
        """A row is gone."""
        first, end = int(self.first_S[slot]), int(self.end_S[slot])
        for page in self.pages_SP[slot, first:end].tolist():
            self.counted.free(page)
        self.pages_SP[slot, first:end] = 0
        self.first_S[slot] = self.end_S[slot] = self._most_S[slot] = 0


class StateRows:
    """States: a step reads a row's in block ``in_S`` and leaves the new one in ``out_S``, mostly the same block.

    To leave a state to the tree, a row goes on in another block.
    """

    def __init__(self, counted: Counted, cache: PrefixCache | None, slots: int) -> None:
        self.counted = counted
        self.in_S, self.out_S = np.zeros((2, slots), np.int64)
        self._cache = cache
        self.most = 1 if cache is None else 2

    def fits(self, leaving: Collection[int] = ()) -> bool:
        """Whether one more row can be admitted, once those in the ``leaving`` slots are gone."""
        rows = np.count_nonzero(self.out_S) - len(leaving) + 1
        return rows * self.most <= self.counted.pool.usable

    def enter(self, slot: int, block: int) -> None:
        """A row begins with the state in ``block``, which it holds."""
        self.in_S[slot] = block
        (self.out_S[slot],) = take(self.counted, self._cache, 1)

    def launched(self, slots: np.ndarray) -> None:
        """A step that runs these rows was launched: nobody writes what it reads before it has read it."""
        for slot in slots[self.in_S[slots] != self.out_S[slots]].tolist():
            if self.in_S[slot]:
                self.counted.free(int(self.in_S[slot]))
            self.in_S[slot] = self.out_S[slot]

    def own(self, slot: int) -> int:
        """The block with the state behind all that was launched, unless the tree has it."""
        block = int(self.in_S[slot])
        return 0 if block in self.counted.nodes else block

    def turn(self, slot: int) -> None:
        """If the tree took the row's state, go on elsewhere."""
        if self.in_S[slot] == self.out_S[slot] and int(self.in_S[slot]) in self.counted.nodes:
            (self.out_S[slot],) = take(self.counted, self._cache, 1)

    def leave(self, slot: int) -> None:
        """A row is gone."""
        for block in {int(self.in_S[slot]), int(self.out_S[slot])} - {0}:
            self.counted.free(block)
        self.in_S[slot] = self.out_S[slot] = 0
