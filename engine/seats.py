"""What the host keeps of every running sequence, by slot: a decode step touches arrays, no sequence.

    S slots   P pages of a row

A running sequence holds pages for the tokens that it has been admitted with, and takes further ones before
they are needed. The first of them may be of the prefix cache (``prefix`` of the sequence); the others are its own.
Of a cache group with a window it holds only what is still read, and takes it chunk by chunk; of states see
``kv/rows.py``. All page lists of a row go on in the same places.

The device owns the sequence: how many tokens it has is known there. The host knows bounds, which are equal
unless a kind of step decides on the device by how much a row grows; then it reserves pages for the most,
relies on the least, and learns the truth when the step's results are read.

The device runs steps in the order in which they are launched, and within a step every layer writes the keys
and values of all rows before any row attends. So what a chosen step computes may be relied on at once, by
later steps and by other rows of the same step, and pages may be given away while a step that reads or
writes them is under way. A state is read as the steps before left it: it is shared once its step is launched.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

import numpy as np

from makeready.engine.errors import RequestError
from makeready.engine.kv.pool import PagePool
from makeready.engine.kv.pools import Pools
from makeready.engine.kv.radix import Prefix, PrefixCache
from makeready.engine.kv.rows import StateRows, WindowRows
from makeready.engine.sequence import TokenSequence
from makeready.graphs.plan.spec import Limits


class Seats:
    """Slots and blocks of running sequences.

    Args:
        limits: of the plan.
        count: slots to use, at most ``limits.max_rows``.
        pools: all blocks.
        cache: None where prefixes are not shared.
        gain: tokens that a generating row can gain in a step, at most.

    Attributes:
        least_S, most_S: bounds of the tokens whose keys and values are in the cache once what is launched has run.
        left_S: tokens that the sequence may still sample, at most, beyond those that are being sampled.
        limit_S: tokens that it can come to.
        held_S: pages, of a group that keeps everything.
        pages_SP: which, for each group in the order of ``Pools.lists``; 0 where none is held.
        told_S: how many of them the device knows.
        windows, states: what rows hold of other groups.

    Raises:
        RequestError: a group has too few blocks for one row.
    """

    def __init__(
        self, limits: Limits, count: int, pools: Pools, cache: PrefixCache | None, gain: int = 1
    ) -> None:
        self.pools = pools
        self.cache = cache
        self._gain = gain
        self.least_S, self.most_S, self.left_S, self.limit_S = np.zeros((4, limits.slots), np.int64)
        self.held_S, self.told_S = np.zeros((2, limits.slots), np.int64)
        self.pages_SP = [np.zeros((limits.slots, limits.pages_per_row), np.int32) for _ in pools.lists]
        self._size = limits.page_size
        own = self.pages_SP[len(pools.full) :]
        self.windows = [
            WindowRows(counted, cache, pages, self._size, gain)
            for counted, pages in zip(pools.windows, own, strict=True)
        ]
        self.states = [StateRows(counted, cache, limits.slots) for counted in pools.states]
        self._fork_S = np.zeros(limits.slots, np.int64)  # to where the tree knew a row's tokens
        self._counted = bool(self.windows or self.states)
        self._free = list(range(count - 1, -1, -1))
        if not self._fits(limits.pages_per_row):
            raise RequestError(
                "a window or state of the model's cache has too few blocks for one row; give it more"
            )

    @property
    def free(self) -> int:
        """Slots for further sequences."""
        return len(self._free)

    def running(self) -> tuple[int, int]:
        """Rows that run, and tokens that they may still generate together."""
        held = self.held_S > 0
        return int(np.count_nonzero(held)), int(self.left_S @ held)

    @property
    def available(self) -> int:
        """Pages that can be had, those that the prefix cache would give up included."""
        return min((pool.free + pool.cached for pool in self.pools.full), default=sys.maxsize)

    @property
    def usable(self) -> int:
        """Pages that a sequence could have if it were alone."""
        return min((pool.usable for pool in self.pools.full), default=sys.maxsize)

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` take."""
        return -(-tokens // self._size)

    def fits(self, sequence: TokenSequence) -> bool:
        """Whether windows and states have room for a sequence."""
        return not self._counted or self._fits(self.pages_for(sequence.most_tokens - 1))

    def enter(self, sequence: TokenSequence, prefix: Prefix | None, known: int = 0) -> None:
        """Give a sequence a slot, and pages for the tokens that are known of it.

        Args:
            sequence: waits; a slot is free, and so are as many pages as it takes beside its prefix.
            prefix: what it holds of the prefix cache.
            known: tokens of it that the cache knows, be they valid or not; with states.
        """
        now = self.pages_for(sequence.length)
        cached = prefix.tokens // self._size if prefix else 0
        slot = sequence.slot = self._free.pop()
        sequence.prefix = prefix
        sequence.borrowed |= bool(cached)
        self.least_S[slot] = self.most_S[slot] = cached * self._size
        self.left_S[slot] = sequence.left
        self.limit_S[slot] = sequence.most_tokens
        self.held_S[slot] = self.told_S[slot] = now  # the device is told of them when it is admitted
        self._fork_S[slot] = known
        for g, pool in enumerate(self.pools.full):
            self.pages_SP[g][slot, :now] = (prefix.blocks[g] if prefix else []) + self._take(
                pool, now - cached
            )
        for g, rows in enumerate(self.windows):
            rows.enter(
                slot, prefix.tails[g] if prefix else [], cached, self.pages_for(sequence.most_tokens - 1)
            )
        for g, rows in enumerate(self.states):
            rows.enter(slot, prefix.states[g] if prefix else 0)

    def could_enter(self, sequence: TokenSequence, leaving: Collection[TokenSequence]) -> bool:
        """Whether a sequence could be admitted, once those that are ``leaving`` are gone."""
        if not self._fits(self.pages_for(sequence.most_tokens - 1), [s.slot for s in leaving]):
            return False
        own = sum(len(self._own(s, 0)) for s in leaving) if self.pools.full else 0
        return self.pages_for(sequence.length) <= self.available + own

    def cut(self, slot: int, start: int, count: int) -> int:
        """Of ``count`` tokens behind ``start``, how many the row's next chunk has; it has pages for these."""
        if not self._counted or not count:
            return count
        if self.states and self.cache is not None:  # end where a state can be left to others
            border, fork = (start + count) // self._size * self._size, int(self._fork_S[slot])
            end = fork if start < fork < start + count else border
            count = end - start if end > start else count
        for rows in self.windows:
            count = min(count, rows.cover(slot, self.pages_for(start + count)) * self._size - start)
        return count

    def page_lists(self, slot: int) -> dict[str, np.ndarray]:
        """The slot fields that hold a row's pages."""
        held = self.held_S[slot]
        return {name: own[slot, :held] for name, own in zip(self.pools.lists, self.pages_SP, strict=True)}

    def short(self, slots: np.ndarray) -> np.ndarray:
        """Slots whose next step may need pages that they do not hold, once for each such page."""
        near = slots[self.most_S[slots] + self._gain > self.held_S[slots] * self._size]
        if not len(near):
            return near
        # The token that ends a sequence is never run: it needs no place.
        tokens = np.minimum(self.most_S[near] + self._gain, self.limit_S[near] - 1)
        return np.repeat(near, np.maximum(-(-tokens // self._size) - self.held_S[near], 0))

    def grow(self, slots: np.ndarray) -> None:
        """Give each slot a further page for each time that it is named; as many are available."""
        at = []
        for slot in slots.tolist():
            at.append(held := int(self.held_S[slot]))
            self.held_S[slot] = held + 1
            for rows in self.windows:
                rows.cover(slot, held + 1)
        for pool, own in zip(self.pools.full, self.pages_SP, strict=False):
            own[slots, at] = self._take(pool, len(at))

    def room_for(self, slot: int, count: int) -> int:
        """Of ``count`` tokens behind a row's, how many have pages; one is taken for them if it can be had."""
        tokens, held = int(self.least_S[slot]) + count, int(self.held_S[slot])
        if self.pools.full and tokens > held * self._size and held == self.told_S[slot] and self.available:
            self.grow(np.array([slot]))
        return count - max(0, tokens - int(self.held_S[slot]) * self._size) if self.pools.full else count

    def news(self, slots: np.ndarray, width: int) -> tuple[np.ndarray, list[np.ndarray]] | None:
        """Pages of these rows that the device is to be told of in the step being staged, ``width`` at most.

        Returns:
            Entry of the page lists at which a row's begin, and they for each group, ``[rows]`` and
            ``[rows, width]``, 0 for none; or None if there are none.
        """
        told = self.told_S[slots]
        missing = np.minimum(self.held_S[slots] - told, width)
        if not missing.any():
            return None
        pages = [np.zeros((len(slots), width), np.int32) for _ in self.pages_SP]
        for g in range(width):
            more = np.flatnonzero(missing > g)
            rows, at = slots[more], told[more] + g
            for own, new in zip(self.pages_SP, pages, strict=True):
                new[more, g] = own[rows, at]
            self.told_S[rows] += 1
        return told, pages

    def advance(self, slots: np.ndarray, least: int, most: int) -> None:
        """A step that lengthens these rows was launched."""
        self.least_S[slots] += least
        self.most_S[slots] += most
        self.left_S[slots] -= least
        if self._counted:
            self.ran(slots)

    def ran(self, slots: np.ndarray) -> None:
        """A step of these rows was launched, or its length learned: what it read last is no longer needed."""
        for rows in self.windows:
            rows.slide(slots, self.least_S[slots])
        for rows in self.states:
            rows.launched(slots)

    def learn(self, slots: np.ndarray, counts: np.ndarray, least: int, most: int) -> None:
        """By how much a step that was launched with these bounds did lengthen the rows."""
        # A row that reached its limit gains nothing in the step behind, which was launched before that was known.
        self.least_S[slots] = np.minimum(self.least_S[slots] + counts - least, self.limit_S[slots] - 1)
        self.most_S[slots] -= most - counts
        self.left_S[slots] -= counts - least
        for rows in self.windows:
            rows.slide(slots, self.least_S[slots])

    def share(self, sequence: TokenSequence, end: int) -> None:
        """Let others have what is complete of the first ``end`` tokens, which the step being chosen runs.

        Not where the cache has the same from elsewhere: pages that are about to be written stay the
        sequence's own, and only a state is left there. With states it is for steps that were launched.
        """
        if self.cache is None or sequence.prefix is None:
            return
        ids = sequence.ids()[: end // self._size * self._size]
        if len(ids) <= sequence.prefix.tokens:
            return
        states = self._state_behind(sequence, end)
        if self.cache.ends(sequence.prefix, ids):
            self._insert(sequence, ids, states)
        elif any(states):
            self.cache.keep_states(sequence.prefix, ids, states)
        for rows in self.states:
            rows.turn(sequence.slot)

    def leave(self, sequence: TokenSequence) -> None:
        """Take slot and blocks back; what was computed of known tokens stays in the prefix cache."""
        slot, prefix = sequence.slot, sequence.prefix
        if self.cache is not None and prefix is not None:
            known = min(int(self.least_S[slot]), sequence.length)
            if known // self._size > prefix.tokens // self._size:
                exact = self.least_S[slot] == self.most_S[slot] == known
                states = self._state_behind(sequence, known) if exact else []
                self._insert(sequence, sequence.ids()[:known], states)
        for rows in (*self.windows, *self.states):
            rows.leave(slot)
        for g, pool in enumerate(self.pools.full):
            pool.release(self._own(sequence, g))
            self.pages_SP[g][slot, : self.held_S[slot]] = 0
        if self.cache is not None and sequence.prefix is not None:
            self.cache.release(sequence.prefix)
            sequence.prefix = None
        self.held_S[slot] = 0
        self._free.append(slot)
        sequence.slot = -1

    def _fits(self, pages: int, leaving: Collection[int] = ()) -> bool:
        """Whether windows and states have room for one more row, of ``pages`` at most."""
        return all(rows.fits(pages, leaving) for rows in self.windows) and all(
            rows.fits(leaving) for rows in self.states
        )

    def _own(self, sequence: TokenSequence, group: int) -> list[int]:
        shared = sequence.prefix.tokens // self._size if sequence.prefix is not None else 0
        return self.pages_SP[group][sequence.slot, shared : self.held_S[sequence.slot]].tolist()

    def _state_behind(self, sequence: TokenSequence, end: int) -> list[int]:
        """Blocks with the states behind the first ``end`` tokens, all that were launched; 0 for none."""
        if end % self._size:
            return [0 for _ in self.states]
        return [rows.own(sequence.slot) for rows in self.states]

    def _insert(self, sequence: TokenSequence, ids: np.ndarray, states: list[int]) -> None:
        assert self.cache is not None
        assert sequence.prefix is not None
        full = len(ids) // self._size
        pages = [own[sequence.slot, :full].tolist() for own in self.pages_SP]
        sequence.prefix = self.cache.insert(sequence.prefix, ids, pages, states)
        sequence.borrowed |= sequence.prefix.blocks != pages[: len(self.pools.full)]

    def _take(self, pool: PagePool, count: int) -> list[int]:
        if self.cache is not None and count > pool.free:
            self.cache.evict(count - pool.free)
        return pool.take(count)
