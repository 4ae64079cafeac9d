"""What the host keeps of every running request, by slot: a decode step touches arrays, no request.

    S slots   P pages of a row

A running request holds pages for the tokens that it has been admitted with, and takes further ones before
they are needed. The first of them may be of the prefix cache (``Request.prefix``); the others are its own.

The device owns the sequence: how many tokens it has is known there. The host knows bounds, which are equal
unless a kind of step decides on the device by how much a row grows; then it reserves pages for the most,
relies on the least, and learns the truth when the step's results are read.

The device runs steps in the order in which they are launched, and within a step every layer writes the keys
and values of all rows before any row attends. So what a chosen step computes may be relied on at once, by
later steps and by other rows of the same step, and pages may be given away while a step that reads or
writes them is under way.
"""

from __future__ import annotations

import numpy as np

from makeready.engine.kv.pool import PagePool
from makeready.engine.kv.radix import PrefixCache
from makeready.engine.request import Request
from makeready.graphs.spec import Limits


class Seats:
    """Slots and pages of running requests.

    Args:
        limits: of the plan.
        count: slots to use, at most ``limits.max_rows``.
        pool: all pages.
        cache: None where prefixes are not shared.

        gain: tokens that a generating row can gain in a step, at most.

    Attributes:
        least_S, most_S: bounds of the tokens whose keys and values are in the cache once what is launched has run.
        left_S: tokens that the request may still sample, at most, beyond those that are being sampled.
        limit_S: tokens that it can come to.
        held_S: pages.
        pages_SP: which; 0 beyond those held.
        told_S: how many of them the device knows.
    """

    def __init__(
        self, limits: Limits, count: int, pool: PagePool, cache: PrefixCache | None, gain: int = 1
    ) -> None:
        self.pool = pool
        self.cache = cache
        self._gain = gain
        self.least_S, self.most_S, self.left_S, self.limit_S = np.zeros((4, limits.slots), np.int64)
        self.held_S, self.told_S = np.zeros((2, limits.slots), np.int64)
        self.pages_SP = np.zeros((limits.slots, limits.pages_per_row), np.int32)
        self._size = limits.page_size
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Slots for further requests."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that can be had, those that the prefix cache would give up included."""
        return self.pool.free + self.pool.cached

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` take."""
        return -(-tokens // self._size)

    def wanted(self, share: float) -> int:
        """Further pages that requests will hold if they still generate a ``share`` of what they may."""
        slots = np.flatnonzero(self.held_S)
        left = self.left_S[slots]
        # The token that ends a request is never run: it needs no place.
        tokens = self.limit_S[slots] - 1 - left + (share * left).astype(np.int64)
        return int(np.maximum(-(-tokens // self._size) - self.held_S[slots], 0).sum())

    def enter(self, request: Request, share: float) -> bool:
        """Give a request a slot, what is cached of it, and pages of its own for the rest of its tokens.

        Args:
            request: waits; a slot is free.
            share: of the tokens that it and all others may still generate, how many pages are kept for.

        Returns:
            Whether pages suffice; nothing has changed otherwise.
        """
        ids = request.ids()
        now = self.pages_for(len(ids))
        later = self.pages_for(len(ids) - 1 + int(share * request.left))
        need = max(now, later) + self.wanted(share)
        if need > self.available:  # cached pages may make up for the difference
            found = self.cache.match(ids[: request.reusable], request.salt) // self._size if self.cache else 0
            if need - found > self.available:
                return False
        reusable = ids[: request.reusable]
        prefix = self.cache.acquire(reusable, request.salt, request.priority) if self.cache else None
        cached = prefix.pages if prefix else []
        if need - len(cached) > self.available:
            if prefix is not None and self.cache is not None:
                self.cache.release(prefix)
            return False
        slot = request.slot = self._free.pop()
        request.prefix = prefix
        request.borrowed |= bool(cached)
        self.least_S[slot] = self.most_S[slot] = len(cached) * self._size
        self.left_S[slot] = request.left
        self.limit_S[slot] = request.most_tokens
        self.held_S[slot] = self.told_S[slot] = now  # the device is told of them when it is admitted
        self.pages_SP[slot, :now] = cached + self._take(now - len(cached))
        return True

    def short(self, slots: np.ndarray) -> np.ndarray:
        """Slots whose next step may need pages that they do not hold, once for each such page."""
        # The token that ends a request is never run: it needs no place.
        tokens = np.minimum(self.most_S[slots] + self._gain, self.limit_S[slots] - 1)
        missing = -(-tokens // self._size) - self.held_S[slots]
        return np.repeat(slots, np.maximum(missing, 0)) if missing.max(initial=0) > 0 else slots[:0]

    def grow(self, slots: np.ndarray) -> None:
        """Give each slot a further page for each time that it is named; as many are available."""
        for slot, page in zip(slots.tolist(), self._take(len(slots)), strict=True):
            self.pages_SP[slot, self.held_S[slot]] = page
            self.held_S[slot] += 1

    def news(self, slots: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Pages of these rows that the device is to be told of in the step being staged, ``width`` at most.

        Returns:
            Entry of the page list at which a row's begin, and they, ``[rows]`` and ``[rows, width]``, 0 for none;
            or None if there are none.
        """
        told = self.told_S[slots]
        missing = np.minimum(self.held_S[slots] - told, width)
        if not missing.any():
            return None
        pages = np.zeros((len(slots), width), np.int32)
        for g in range(width):
            more = missing > g
            pages[more, g] = self.pages_SP[slots[more], told[more] + g]
        self.told_S[slots] += missing
        return told, pages

    def advance(self, slots: np.ndarray, least: int, most: int) -> None:
        """A step that lengthens these rows was launched."""
        self.least_S[slots] += least
        self.most_S[slots] += most
        self.left_S[slots] -= least

    def learn(self, slots: np.ndarray, counts: np.ndarray, least: int, most: int) -> None:
        """By how much a step that was launched with these bounds did lengthen the rows."""
        # A row that reached its limit gains nothing in the step behind, which was launched before that was known.
        self.least_S[slots] = np.minimum(self.least_S[slots] + counts - least, self.limit_S[slots] - 1)
        self.most_S[slots] -= most - counts
        self.left_S[slots] -= counts - least

    def share(self, request: Request, end: int) -> None:
        """Let others have the full pages of the first ``end`` tokens, which the step being chosen completes.

        Not where the cache has the same from elsewhere: pages that are about to be written stay the
        request's own.
        """
        if self.cache is None or request.prefix is None:
            return
        ids = request.ids()[: end // self._size * self._size]
        if len(ids) > request.prefix.tokens >= self.cache.match(ids, request.salt):
            self._insert(request, ids)

    def leave(self, request: Request) -> None:
        """Take slot and pages back; what was computed of known tokens stays in the prefix cache."""
        slot = request.slot
        if self.cache is not None and request.prefix is not None:
            known = min(int(self.least_S[slot]), request.length)
            if known // self._size > len(request.prefix.pages):
                self._insert(request, request.ids()[:known])
            self.pool.release(self._own(request))
            self.cache.release(request.prefix)
            request.prefix = None
        else:
            self.pool.release(self._own(request))
        self.pages_SP[slot, : self.held_S[slot]] = 0
        self.held_S[slot] = 0
        self._free.append(slot)
        request.slot = -1

    def own(self, request: Request) -> int:
        """Pages that its leaving makes available for sure."""
        return len(self._own(request))

    def _own(self, request: Request) -> list[int]:
        shared = len(request.prefix.pages) if request.prefix is not None else 0
        return self.pages_SP[request.slot, shared : self.held_S[request.slot]].tolist()

    def _insert(self, request: Request, ids: np.ndarray) -> None:
        assert self.cache is not None
        assert request.prefix is not None
        pages = self.pages_SP[request.slot, : len(ids) // self._size].tolist()
        request.prefix = self.cache.insert(request.prefix, ids, pages)
        request.borrowed |= request.prefix.pages != pages

    def _take(self, count: int) -> list[int]:
        if self.cache is not None and count > self.pool.free:
            self.cache.evict(count - self.pool.free)
        return self.pool.take(count)
