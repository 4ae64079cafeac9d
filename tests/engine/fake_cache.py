"""The memory of a device that computes nothing: pages, windows and states of hashes.

What stands in for keys and values of a token is a hash of it and of all tokens before it; a state is the hash
of all tokens so far and how many they are. Reading one that is another's, stale, or not there is found at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from makeready.graphs.plan.spec import CacheGroup, CacheSpec, Limits

M = 0x9E3779B97F4A7C15  # odd
MASK = 2**64 - 1
GARBAGE = 0xDEAD


def fold(tokens: Sequence[int], value: int = 0) -> int:
    """A hash of a sequence that goes on behind one with the hash ``value``."""
    for token in tokens:
        value = (value * M + token + 1) & MASK
    return value


class FakePages:
    """The pages of a group, and each slot's list of them."""

    def __init__(self, cache: CacheSpec, group: CacheGroup, blocks: int, limits: Limits) -> None:
        self.size, self.window = cache.page_size, group.window
        self.list_field = cache.field(group.name, "pages")
        self.grow_field = cache.field(group.name, "grow_page")
        self.tokens = np.full(blocks * self.size, -1)
        self.folds = np.zeros(blocks * self.size, np.uint64)
        self.pages = np.zeros((limits.slots, limits.pages_per_row), np.int64)

    def scribble(self, blocks: Sequence[int]) -> None:
        """These blocks are free: what is in them means nothing."""
        for block in blocks:
            at = slice(block * self.size, (block + 1) * self.size)
            self.tokens[at], self.folds[at] = -1, GARBAGE

    def write_slot(self, slot: int, values: Mapping[str, Any]) -> None:
        first = values.get(self.list_field, ())
        self.pages[slot] = 0  # what the last request left there must not matter
        self.pages[slot, : len(first)] = first

    def grow(self, slot: int, at: int, pages: Sequence[int]) -> None:
        for g, page in enumerate(pages):
            if page:
                assert self.pages[slot, at + g] == 0, "a page takes the place of another"
                self.pages[slot, at + g] = page

    def places(self, slot: int, at: np.ndarray) -> np.ndarray:
        return self.pages[slot, at // self.size] * self.size + at % self.size

    def before(self, slot: int, start: int) -> int:
        """The hash of the tokens before ``start``, as the last of them has it."""
        return int(self.folds[self.places(slot, np.array([start - 1]))[0]]) if start else 0

    def write(self, slot: int, at: np.ndarray, tokens: Sequence[int], folds: Sequence[int]) -> np.ndarray:
        places = self.places(slot, at)
        assert (places >= self.size).all(), "a live token is written to the null page"
        self.tokens[places] = tokens
        self.folds[places] = np.array(folds, np.uint64)
        return places

    def read(self, slot: int, first: int, end: int) -> np.ndarray:
        """Check all that tokens ``first:end`` read, and give these tokens."""
        begin = max(0, first - self.window + 1) if self.window else 0
        places = self.places(slot, np.arange(begin, end))
        assert (places >= self.size).all(), "a context reaches into the null page"
        tokens, folds = self.tokens[places], self.folds[places]
        before = np.append(np.uint64(0), folds[:-1])
        chained = folds == before * np.uint64(M) + (tokens + 1).astype(np.uint64)
        if begin:  # what went before the window is not read
            chained[0] = True
        assert chained.all(), "a page in the context is not of this sequence"
        assert (tokens >= 0).all(), "a page in the context was never written"
        return tokens


class FakeStates:
    """The states of a group: a hash and a length for each block."""

    def __init__(self, cache: CacheSpec, group: CacheGroup, blocks: int) -> None:
        self.in_field = cache.field(group.name, "state_in")
        self.out_field = cache.field(group.name, "state_out")
        self.states: list[tuple[int, int]] = [(0, 0)] + [(GARBAGE, -1)] * (blocks - 1)
        self._running: dict[int, tuple[int, int]] = {}
        self._out: dict[int, int] = {}

    def scribble(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.states[block] = (GARBAGE, -1)

    def begin(self, step: Mapping[str, np.ndarray], rows: int) -> None:
        """Read the states of a step's rows."""
        slots = step["row_slot"][:rows].tolist()
        read, written = step[self.in_field][:rows].tolist(), step[self.out_field][:rows].tolist()
        assert 0 not in written, "the null state is written"
        assert len(set(written)) == rows, "two rows write one state"
        for row in range(rows):
            others = written[:row] + written[row + 1 :]
            assert read[row] not in others, "a row reads a state that another writes in the same step"
        self._running = {slot: self.states[block] for slot, block in zip(slots, read, strict=True)}
        self._out = dict(zip(slots, written, strict=True))

    def before(self, slot: int, start: int) -> int:
        value, length = self._running[slot]
        assert length == start, f"the state is of {length} tokens, {start} went before"
        return value

    def write(self, slot: int, at: np.ndarray, tokens: Sequence[int], folds: Sequence[int]) -> None:
        self._running[slot] = (folds[-1], int(at[-1]) + 1)

    def end(self) -> None:
        """The step's last states are there."""
        for slot, block in self._out.items():
            self.states[block] = self._running[slot]
