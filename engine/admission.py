"""Whether a sequence may run beside those that do: the pages that all of them will hold, until each has ended.

    R running rows, and the one to admit   S slots   C leading pages that rows may share

A row gains a token a step and gives its pages back when it ends. So what all hold together rises from one end to the
next, and its peak is at one of these ends: with rows in order of their ends it is a matter of sums. A sequence is
admitted if the peak is within the pool, as in the Past-Future scheduler (arXiv 2507.10150). Where ends are known no
page runs out later; else they are estimated (lengths.py), and a row is sent back to wait where that was wrong.

A row whose prompt may take several steps counts as if it took one, and goes away as if it took them all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from makeready.engine.errors import RequestError
from makeready.engine.lengths import OutputLengths, lot, may_end_early
from makeready.engine.options import SchedulerOptions
from makeready.engine.seats import Seats
from makeready.engine.sequence import LENGTH, STOP, TokenSequence
from makeready.graphs.plan.spec import Limits


class Peak(NamedTuple):
    """The most pages that rows will hold at once, and how many steps away that is."""

    pages: int
    steps: int


def peak_of(
    tokens_R: np.ndarray, left_R: np.ndarray, size: int, elsewhere_R: np.ndarray | None = None
) -> Peak:
    """Of rows that gain a token a step each and go away behind their last.

    Args:
        tokens_R: that rows have in their pages, int64; one at least.
        left_R: steps that they still run, int64.
        size: tokens a page.
        elsewhere_R: leading pages of each that are counted with another, one that stays for as long.
    """
    order = np.argsort(-left_R)
    # A row of t tokens has (t + size - 1) // size pages; k steps later it has (t + k + size - 1) // size.
    pages, part = np.divmod(tokens_R[order] + (size - 1), size)
    left = left_R[order]
    more, rest = np.divmod(left, size)
    if elsewhere_R is not None:
        pages -= elsewhere_R[order]
    rows = np.arange(1, len(order) + 1)
    # What all that are still there hold in each row's last step, but for what begun pages overflow into.
    low = np.cumsum(pages) + rows * more
    at = int(low.argmax())
    peak = int(low[at])
    near = np.flatnonzero(low + rows * (rest > 0) > peak)
    if len(near):
        begun = (part >= (size - rest[near])[:, None]) & (rows <= rows[near, None])
        exact = low[near] + begun.sum(1)
        if exact.max() > peak:
            peak, at = int(exact.max()), int(near[exact.argmax()])
    return Peak(peak, int(left[at]))


class Admission:
    """Gives waiting sequences their seats while pages last.

    Args:
        seats: of the running sequences.
        limits: of the plan.
        options: how many tokens of prompts run in which steps, and what is expected of outputs.
    """

    def __init__(self, seats: Seats, limits: Limits, options: SchedulerOptions) -> None:
        self._seats, self._size, self._context_len = seats, limits.page_size, limits.context_len
        self._chunk = options.chunked_prefill_size or limits.max_tokens
        self._interval = options.decode_interval + 1
        self._lengths = OutputLengths(options.new_token_ratio, options.min_new_token_ratio)
        slots = len(seats.held_S)
        self._most_S, self._worst_S, self._cached_S = np.zeros((3, slots), np.int64)
        self._early_S, self._lot_S = np.zeros(slots, bool), np.zeros(slots)
        self._steps = 0  # that were launched
        self._refused, self._until = -1, 0  # whom, and up to which step for sure

    def check(self, sequence: TokenSequence) -> None:
        """Whether a sequence could ever run.

        Raises:
            RequestError: it is too long for the context, or for all pages together.
        """
        # Without tokens of its own a prompt may fill the context: what is sampled behind it is dropped.
        if len(sequence.prompt) + sequence.sampling.max_new_tokens > self._context_len:
            raise RequestError(
                f"{len(sequence.prompt)} prompt tokens and max_new_tokens={sequence.sampling.max_new_tokens} exceed "
                f"the context of {self._context_len} tokens; shorten the prompt or lower max_new_tokens"
            )
        # The last token is sampled but never run, so it needs no place in the cache.
        pages = self._seats.pages_for(sequence.most_tokens - 1)
        if pages > self._seats.usable:
            raise RequestError(
                f"the request may need {pages} KV pages, there are {self._seats.usable}; "
                "lower max_new_tokens or raise kv.memory_gib"
            )

    def launched(self, chunks: bool) -> None:
        """A step runs, with chunks of prompts or without. Rows that end by their limits are no news."""
        self._steps += 1
        if chunks:  # others may share what they complete
            self.changed()

    def changed(self) -> None:
        """What rows will hold is not what it was taken for any more."""
        self._refused = -1

    def ended(self, sequence: TokenSequence) -> None:
        """A sequence has ended: learn how long it was, if that was not clear before."""
        if sequence.finish_reason in (STOP, LENGTH) and may_end_early(sequence):
            self._lengths.learn(sequence)
            self.changed()

    def enter(self, sequence: TokenSequence) -> bool:
        """Give a sequence a slot, what is cached of it, and pages for its tokens; a slot is free.

        Returns:
            Whether pages last; nothing has changed otherwise.
        """
        seats, cache = self._seats, self._seats.cache
        if (sequence.ticket == self._refused and self._steps < self._until) or not seats.fits(sequence):
            return False
        ids, now = sequence.ids(), seats.pages_for(sequence.length)
        reusable = ids[: sequence.reusable]
        peak = self._peak(sequence)
        short = max(now - seats.available, peak.pages - seats.usable)
        if short > 0:  # cached pages may make up for the difference
            found = cache.match(reusable, sequence.salt) // self._size if cache else 0
            if found < short:
                return self._refuse(sequence, peak, found)
        known = cache.known(reusable, sequence.salt) if cache and seats.states else 0
        prefix = cache.acquire(reusable, sequence.salt, sequence.priority) if cache else None
        cached = prefix.tokens // self._size if prefix else 0
        if short > 0 and cache is not None and prefix is not None:
            peak = self._peak(sequence, prefix.blocks[0])
            if peak.pages > seats.usable or now - cached > seats.available:
                cache.abandon(prefix)
                return self._refuse(sequence, peak)
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
            and self._peak(sequence, leaving=gone).pages <= self._seats.usable
        )

    def _refuse(self, sequence: TokenSequence, peak: Peak, found: int = 0) -> bool:
        """A sequence has to wait, with a peak that is lower by ``found`` at most: until when, if nothing changes.

        Who comes later has fewer tokens at the peak, by one a step. All others end as they would, or later where
        ends are estimates, so that it stays until it is over or the missing pages are made up for.
        """
        over = peak.pages - found - self._seats.usable
        self._refused, self._until = (
            sequence.ticket,
            self._steps + max(0, min(peak.steps, (over - 1) * self._size + 1)),
        )
        return False

    def _peak(
        self, sequence: TokenSequence, blocks: Sequence[int] = (), leaving: Collection[int] = ()
    ) -> Peak:
        """The most pages that all rows will hold with one more; where that many are there, they may be fewer.

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
            return Peak(worst, 0)
        slots = np.flatnonzero(held_S)
        left_R = _with(seats.left_S[slots], sequence.left)
        # The last token of a sequence is sampled and never run: it has no place.
        tokens_R = _with(seats.limit_S[slots], sequence.most_tokens) - 1 - left_R
        to_run_R = _with(tokens_R[:-1] - seats.least_S[slots], sequence.length)
        early_R = _with(self._early_S[slots], may_end_early(sequence))
        if early_R.any():
            most_R = _with(self._most_S[slots], sequence.most)
            lots_R = _with(self._lot_S[slots], lot(sequence.ticket))
            left_R = np.where(early_R, self._lengths.expected(left_R, most_R, lots_R), left_R)
        # A prompt may take so many steps more than one, cut where that suits the buckets; its row ends later then.
        left_R = left_R + np.where(to_run_R > 0, self._interval * (1 + to_run_R // self._chunk), 0)
        columns = max(len(blocks), int(self._cached_S[slots].max(initial=0)))
        elsewhere_R = self._elsewhere(slots, left_R, blocks, columns) if columns else None
        return peak_of(tokens_R, left_R, self._size, elsewhere_R)

    def _elsewhere(
        self, slots: np.ndarray, left_R: np.ndarray, blocks: Sequence[int], columns: int
    ) -> np.ndarray:
        """Of the leading ``columns`` pages of each row, how many a row holds that ends later, or as late."""
        pages_RC = np.zeros((len(left_R), columns), np.int64)
        pages_RC[:-1] = self._seats.pages_SP[0][slots, :columns]
        pages_RC[-1, : len(blocks)] = blocks
        rank_R = np.empty(len(left_R), np.int64)
        rank_R[np.argsort(-left_R)] = np.arange(len(left_R))
        first = np.full(self._seats.pools.full[0].pages, len(left_R), np.int64)
        ranks = np.repeat(rank_R, columns)
        np.minimum.at(first, pages_RC.ravel(), ranks)
        others = (first[pages_RC] < rank_R[:, None]) & (pages_RC > 0)
        return others.sum(1)


def _with(values: np.ndarray, one: float) -> np.ndarray:
    """Values of rows and of one more; ten times as fast as ``np.append``."""
    made = np.empty(len(values) + 1, values.dtype)
    made[:-1], made[-1] = values, one
    return made
