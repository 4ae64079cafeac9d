"""Which requests run next, and with how many of their tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from makeready.engine.errors import RequestError
from makeready.engine.kv.pool import PagePool
from makeready.engine.request import Request
from makeready.graphs.spec import DECODE, EXTEND, Limits


@dataclass(frozen=True)
class Batch:
    """One step's work: rows in order, each a request and how many of its pending tokens run.

    ``phase`` is decode where every row runs the one token that was sampled last.
    """

    phase: str
    rows: tuple[tuple[Request, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(count for _, count in self.rows)


class Scheduler:
    """First come, first served; long prompts in chunks beside the decode rows.

    A request is admitted when a slot is free and the pool can hold it to its last possible token, so a
    running request never waits for pages. While some prompt is unfinished, steps are of the phase extend:
    every decoding row takes its token first, then prompts share the rest of ``max_tokens`` in the order of
    arrival.
    """

    def __init__(self, limits: Limits, pool: PagePool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._slots = list(range(limits.max_rows - 1, -1, -1))

    def pages_for(self, request: Request) -> int:
        """Pages that the request can come to need."""
        # The last token is sampled but never run, so it needs no place in the cache.
        return -(-(request.most_tokens - 1) // self.limits.page_size)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run: too long for the context, or for all pages together.
        """
        if request.most_tokens > self.limits.context_len:
            raise RequestError(
                f"{len(request.prompt)} prompt tokens and max_new_tokens={request.sampling.max_new_tokens} exceed "
                f"the context of {self.limits.context_len} tokens; shorten the prompt or lower max_new_tokens"
            )
        if self.pages_for(request) > self.pool.usable:
            raise RequestError(
                f"the request may need {self.pages_for(request)} KV pages, there are {self.pool.usable}; "
                "lower max_new_tokens or raise kv.memory_gib"
            )
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Move requests from the queue to the running ones while slots and pages last; returns them."""
        admitted = []
        while self.waiting and self._slots and self.pages_for(self.waiting[0]) <= self.pool.free:
            request = self.waiting.popleft()
            request.slot = self._slots.pop()
            request.pages = self.pool.take(self.pages_for(request))
            self.running.append(request)
            admitted.append(request)
        return admitted

    def next(self) -> Batch | None:
        """The next step's work, or None where nothing runs."""
        if not self.running:
            return None
        decoding = [r for r in self.running if r.output and r.pending == 1]
        if len(decoding) == len(self.running):
            return Batch(DECODE, tuple((r, 1) for r in decoding))
        rows = [(r, 1) for r in decoding]
        budget = self.limits.max_tokens - len(rows)
        for request in self.running:
            if budget and not (request.output and request.pending == 1):
                count = min(budget, request.pending)
                rows.append((request, count))
                budget -= count
        return Batch(EXTEND, tuple(rows))

    def retire(self, request: Request) -> None:
        """Take back the slot and the pages of a running request that is done."""
        self.running.remove(request)
        self._slots.append(request.slot)
        self.pool.release(request.pages)
        request.slot, request.pages = -1, []
