"""What the host keeps of every running request, by slot: a decode step touches arrays, no request.

    S slots   P pages of a row

A running request holds pages for the tokens that it has been admitted with, and takes one more whenever it
grows past its last. The first of them may be of the prefix cache (``Request.prefix``); the others are its own.

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

    Attributes:
        computed_S: tokens whose keys and values are in the cache, or will be once what is launched has run.
        left_S: tokens that the request may still sample, beyond those that are being sampled.
        most_S: tokens that it can come to.
        held_S: pages.
        pages_SP: which; 0 beyond those held.
    """

    def __init__(self, limits: Limits, count: int, pool: PagePool, cache: PrefixCache | None) -> None:
        self.pool = pool
        self.cache = cache
        self.computed_S, self.left_S, self.most_S, self.held_S = np.zeros((4, limits.slots), np.int64)
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
        """Pages that so many tokens take."""
        return -(-tokens // self._size)

    def wanted(self, share: float) -> int:
        """Further pages that requests come to hold if they still generate a share of what they may."""
        slots = np.flatnonzero(self.held_S)
        left = self.left_S[slots]
        # The token that ends a request is never run: it needs no place.
        tokens = self.most_S[slots] - 1 - left + (share * left).astype(np.int64)
        return int(np.maximum(-(-tokens // self._size) - self.held_S[slots], 0).sum())

    def enter(self, request: Request, share: float) -> bool:
        """Give a request a slot, what is cached of it, and pages of its own for the rest of its tokens.

        Args:
            request: waits; a slot is free.
            share: of what it and all others may still generate that has to find pages as well.

        Returns:
            Whether pages suffice; nothing has changed otherwise.
        """
        ids = request.ids()
        now = self.pages_for(len(ids))
        later = self.pages_for(len(ids) - 1 + int(share * request.left))
        need = max(now, later) + self.wanted(share)
        if need > self.available:  # then it is worth a look whether cached pages could make up for what lacks
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
        self.computed_S[slot] = len(cached) * self._size
        self.left_S[slot] = request.left
        self.most_S[slot] = request.most_tokens
        self.held_S[slot] = now
        self.pages_SP[slot, :now] = cached + self._take(now - len(cached))
        return True

    def short(self, slots: np.ndarray) -> np.ndarray:
        """Those of the slots whose next token needs a page that they do not hold."""
        return slots[self.computed_S[slots] >= self.held_S[slots] * self._size]

    def grow(self, slots: np.ndarray) -> None:
        """Give each slot a further page; as many are available."""
        self.pages_SP[slots, self.held_S[slots]] = self._take(len(slots))
        self.held_S[slots] += 1

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
            known = min(int(self.computed_S[slot]), request.length)
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
