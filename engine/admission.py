"""Whether a sequence may run beside those that do: the pages that all of them will hold, until each has ended.

    R running rows, and the one to admit   S slots   C leading pages that rows may share

A row gains a token a step and gives its pages back when it ends. So what all hold together rises from one end to the
next, and its peak is at one of these ends: with rows in order of their ends it is a matter of sums. A sequence is
admitted if the peak is within the pool, as in the Past-Future scheduler (arXiv 2507.10150). Where ends are known no
page runs out later; else they are estimated (lengths.py), and a row is sent back to wait where that was wrong.

A prompt that takes several steps counts as if it took one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from makeready.engine.lengths import OutputLengths, lot, may_end_early
from makeready.engine.options import SchedulerOptions
from makeready.engine.seats import Seats
from makeready.engine.sequence import LENGTH, STOP, TokenSequence


def peak_pages(
    tokens_R: np.ndarray, left_R: np.ndarray, size: int, elsewhere_R: np.ndarray | None = None
) -> int:
    """Most pages that rows hold at once if each gains a token a step and goes away behind its last.

    Args:
        tokens_R: that rows have in their pages, int64.
        left_R: steps that they still run, int64; a row is gone behind the last.
        size: tokens a page.
        elsewhere_R: leading pages of each that are counted with another, one that stays for as long.
    """
    if not len(tokens_R):
        return 0
    order = np.argsort(-left_R, kind="stable")
    # A row of t tokens has (t + size - 1) // size pages, and k steps later so many of (t + k).
    pages, part = np.divmod(tokens_R[order] + (size - 1), size)
    more, rest = np.divmod(left_R[order], size)
    if elsewhere_R is not None:
        pages -= elsewhere_R[order]
    rows = np.arange(1, len(order) + 1)
    # What those of them that are still there hold in each row's last step, but for pages that begun ones fill up to.
    low = np.cumsum(pages) + rows * more
    peak = int(low.max())
    near = np.flatnonzero(low + rows * (rest > 0) > peak)
    if len(near):
        begun = (part >= (size - rest[near])[:, None]) & (rows <= rows[near, None])
        peak = max(peak, int((low[near] + begun.sum(1)).max()))
    return peak


class Admission:
    """Gives waiting sequences their seats while pages last.

    Args:
        seats: of the running sequences.
        page_size: tokens a page.
        options: ``new_token_ratio`` and ``min_new_token_ratio``.
    """

    def __init__(self, seats: Seats, page_size: int, options: SchedulerOptions) -> None:
        self._seats, self._size = seats, page_size
        self._lengths = OutputLengths(options.new_token_ratio, options.min_new_token_ratio)
        slots = len(seats.held_S)
        self._most_S, self._worst_S, self._cached_S = np.zeros((3, slots), np.int64)
        self._early_S, self._lot_S = np.zeros(slots, bool), np.zeros(slots)

    def ended(self, sequence: TokenSequence) -> None:
        """A sequence has ended: learn how long it was, if that was not clear before."""
        if sequence.finish_reason in (STOP, LENGTH) and may_end_early(sequence):
            self._lengths.learn(sequence)

    def enter(self, sequence: TokenSequence) -> bool:
        """Give a sequence a slot, what is cached of it, and pages for its tokens; a slot is free.

        Returns:
            Whether pages last; nothing has changed otherwise.
        """
        seats, cache = self._seats, self._seats.cache
        if not seats.fits(sequence):
            return False
        ids, now = sequence.ids(), seats.pages_for(sequence.length)
        reusable = ids[: sequence.reusable]
        short = max(now - seats.available, self._peak(sequence) - seats.usable)
        if short > 0:  # cached pages may make up for the difference
            found = cache.match(reusable, sequence.salt) if cache else 0
            if seats.pages_for(found) < short:
                return False
        known = cache.known(reusable, sequence.salt) if cache and seats.states else 0
        prefix = cache.acquire(reusable, sequence.salt, sequence.priority) if cache else None
        cached = seats.pages_for(prefix.tokens) if prefix else 0
        if short > 0 and cache is not None and prefix is not None:
            lasts = self._peak(sequence, prefix.blocks[0]) <= seats.usable
            if not lasts or now - cached > seats.available:
                cache.abandon(prefix)
                return False
        seats.enter(sequence, prefix, known)
        slot = sequence.slot
        self._most_S[slot] = sequence.most
        self._worst_S[slot] = seats.pages_for(sequence.most_tokens - 1)
        self._cached_S[slot] = cached
        self._early_S[slot] = may_end_early(sequence)
        self._lot_S[slot] = lot(sequence.ticket)
        return True

    def could_enter(self, sequence: TokenSequence, leaving: Collection[TokenSequence]) -> bool:
        """Whether a sequence could be admitted, once those that are ``leaving`` are gone."""
        gone = [each.slot for each in leaving]
        return (
            self._seats.could_enter(sequence, leaving)
            and self._peak(sequence, leaving=gone) <= self._seats.usable
        )

    def _peak(
        self, sequence: TokenSequence, blocks: Sequence[int] = (), leaving: Collection[int] = ()
    ) -> int:
        """Most pages that all rows will hold with one more, or at least more than there are if it is so many.

        Args:
            blocks: leading pages of it that it would take from the cache.
            leaving: slots that count as free.
        """
        seats = self._seats
        held_S = seats.held_S > 0
        held_S[list(leaving)] = False
        last = seats.pages_for(sequence.most_tokens - 1)
        worst = int(self._worst_S @ held_S) + last
        if worst <= seats.usable:
            return worst
        slots = np.flatnonzero(held_S)
        left_R = np.append(seats.left_S[slots], sequence.left)
        # The last token of a sequence is sampled and never run: it has no place.
        tokens_R = np.append(seats.limit_S[slots], sequence.most_tokens) - 1 - left_R
        early_R = np.append(self._early_S[slots], may_end_early(sequence))
        if early_R.any():
            most_R = np.append(self._most_S[slots], sequence.most)
            lots_R = np.append(self._lot_S[slots], lot(sequence.ticket))
            left_R = np.where(early_R, self._lengths.expected(left_R, most_R, lots_R), left_R)
        columns = max(len(blocks), int(self._cached_S[slots].max(initial=0)))
        elsewhere_R = self._elsewhere(slots, left_R, blocks, columns) if columns else None
        return peak_pages(tokens_R, left_R, self._size, elsewhere_R)

    def _elsewhere(
        self, slots: np.ndarray, left_R: np.ndarray, blocks: Sequence[int], columns: int
    ) -> np.ndarray:
        """Of the leading ``columns`` pages of each row, how many a row holds that ends later, or as late."""
        pages_RC = np.zeros((len(left_R), columns), np.int64)
        pages_RC[:-1] = self._seats.pages_SP[0][slots, :columns]
        pages_RC[-1, : len(blocks)] = blocks
        rank_R = np.empty(len(left_R), np.int64)
        rank_R[np.argsort(-left_R, kind="stable")] = np.arange(len(left_R))
        first = np.full(self._seats.pools.full[0].pages, len(left_R), np.int64)
        ranks = np.repeat(rank_R, columns)
        np.minimum.at(first, pages_RC.ravel(), ranks)
        others = (first[pages_RC] < rank_R[:, None]) & (pages_RC > 0)
        return others.sum(1)
