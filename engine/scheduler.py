"""Which requests run next, and with how many of their tokens.

    grow        a page for every generating request that has filled its last one; pages may run out
    continue    the prompt that is partly computed
    admit       waiting requests, while slots, pages and tokens of the step last
    launched    what was chosen counts as computed from here on

Nothing here waits for a token: what a step samples feeds the next on the device, and how long a request can
get at most is known. Only whether it ends before that is learned later, when results are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from makeready.engine.batch import Batch, Chunk
from makeready.engine.errors import RequestError
from makeready.engine.kv.pools import Pools
from makeready.engine.kv.radix import PrefixCache
from makeready.engine.options import PRIORITY, SchedulerOptions
from makeready.engine.policy import WaitingQueue
from makeready.engine.request import ABORT, Request
from makeready.engine.seats import Seats
from makeready.engine.steps.base import step_kinds
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.spec import EXTEND, INPUT_LOGPROBS, Bucket, Limits, StepSpec

# As SGLang has them: steps in which new_token_ratio falls from 1 to its least, and tokens that each running
# request is given before pages may run out again.
DECAY_STEPS, AHEAD = 600, 20


class Scheduler:
    """Continuous batching: chunked prompts beside generating rows, a prefix cache, retraction.

    Args:
        limits, steps, buckets: of the plan.
        pools: the blocks of each cache group.
        options: what the user chose.

    Attributes:
        waiting: requests without a slot.
        running: requests with a slot, in order of admission, and those whose last token is being sampled;
            True for those whose known tokens are all computed.

    Raises:
        RequestError: the options ask for more than the plan's programs can take.
    """

    def __init__(
        self,
        limits: Limits,
        steps: Mapping[str, StepSpec],
        buckets: Sequence[Bucket],
        pools: Pools,
        options: SchedulerOptions,
    ) -> None:
        chunk, rows = options.chunked_prefill_size, options.max_running_requests
        if chunk is not None and chunk > limits.max_tokens:
            raise RequestError(
                f"scheduler.chunked_prefill_size={chunk} exceeds the plan's steps of {limits.max_tokens} tokens; "
                f"lower it, or recompile with plan.max_tokens={chunk}"
            )
        if rows is not None and rows > limits.max_rows:
            raise RequestError(
                f"scheduler.max_running_requests={rows} exceeds the plan's {limits.max_rows} rows; "
                f"lower it, or recompile with plan.max_rows={rows}"
            )
        self.limits = limits
        self.options = options
        self.cache = PrefixCache(pools, limits.page_size, options.eviction) if options.prefix_cache else None
        self.waiting = WaitingQueue(options, self.cache, limits.page_size)
        self.running: dict[Request, bool] = {}
        self._kinds = step_kinds(steps)
        self._steps = steps
        self._gain = max(kind.most for kind in self._kinds)
        self.seats = Seats(limits, rows or limits.max_rows, pools, self.cache, self._gain)
        self._table = BucketTable(buckets)
        self._extend = [(bucket.rows, bucket.tokens) for bucket in buckets if bucket.phase == EXTEND]
        self._decoding: list[Request] = []
        self._slots = np.zeros(0, np.int64)  # of _decoding
        self._prefilling: list[Request] = []
        self._ratio = options.new_token_ratio
        self._retractions = 0  # for the step that is being chosen
        self._steps_without_prompts = options.decode_interval

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run, being too long for the context or for all pages together; or
                too many wait already.
        """
        # Without tokens of its own a prompt may fill the context: what is sampled behind it is dropped.
        if len(request.prompt) + request.sampling.max_new_tokens > self.limits.context_len:
            raise RequestError(
                f"{len(request.prompt)} prompt tokens and max_new_tokens={request.sampling.max_new_tokens} exceed "
                f"the context of {self.limits.context_len} tokens; shorten the prompt or lower max_new_tokens"
            )
        # The last token is sampled but never run, so it needs no place in the cache.
        pages = self.seats.pages_for(request.most_tokens - 1)
        if pages > self.seats.usable:
            raise RequestError(
                f"the request may need {pages} KV pages, there are {self.seats.usable}; "
                "lower max_new_tokens or raise kv.memory_gib"
            )
        most = self.options.max_queued_requests
        if most is not None and len(self.waiting) >= most:
            raise RequestError(
                f"{most} requests wait already, as many as scheduler.max_queued_requests allows; try again later"
            )
        self.waiting.add(request)

    def next(self) -> Batch | None:
        """The next step's work; None where there is none, or none before results are read."""
        self._retractions = 0
        if self._gain > 1:
            self._slots = _STALE  # which rows may have come to their end changes with every result
        self._relax()
        self._grow()
        chunks: list[Chunk] = []
        admitted: list[Request] = []
        # Tokens per second of a step with few prompt tokens and of one with many differ little, the time until
        # it ends does: decode_interval says how often those who generate wait for the longer one.
        if not self._decoding or self._steps_without_prompts >= self.options.decode_interval:
            chunks = self._continue()
            admitted = self._admit(chunks)
        self._steps_without_prompts = 0 if chunks else self._steps_without_prompts + 1
        self._collect()
        if not self._decoding and not chunks:
            return None
        first, *others = self._kinds
        batch = Batch(self._decoding, self._slots, chunks, admitted, self._retractions, first)
        return batch if first.takes(batch) else replace(batch, kind=next(k for k in others if k.takes(batch)))

    def launched(self, batch: Batch) -> None:
        """The step runs, or is sure to: what it computes is relied on from here on."""
        seats = self.seats
        seats.advance(batch.slots, batch.kind.least, batch.kind.most)
        # Whose last token is being sampled has nothing left to run: the next request can have the seat.
        ended = [batch.decoding[row] for row in np.flatnonzero(seats.left_S[batch.slots] == 0).tolist()]
        if batch.chunks:
            self._ran(batch.chunks)
        for chunk in batch.chunks:
            request = chunk.request
            request.scored += chunk.scores
            if chunk.last:
                seats.left_S[request.slot] -= 1
                self._prefilling.remove(request)
                self.running[request] = True
                self._slots = _STALE
                if not seats.left_S[request.slot]:
                    ended.append(request)
        for request in ended:
            seats.leave(request)
            self._slots = _STALE

    def _ran(self, chunks: Sequence[Chunk]) -> None:
        """Chunks were launched. With states, what they complete can be shared now, for it is read by later steps."""
        seats = self.seats
        slots = np.array([chunk.request.slot for chunk in chunks])
        counts = np.array([chunk.count for chunk in chunks])
        seats.least_S[slots] += counts
        seats.most_S[slots] += counts
        seats.ran(slots)
        for chunk in chunks if seats.states else ():
            seats.share(chunk.request, chunk.start + chunk.count)

    def learned(self, batch: Batch, counts: np.ndarray) -> None:
        """By how much a step lengthened the generating rows, where only the device knew.

        Who has left its slot since then has nothing to learn. Nobody can have come back to it: who is sent back
        to wait is not admitted before the step that was under way is read.
        """
        stay = np.array(
            [r.slot == s for r, s in zip(batch.decoding, batch.slots.tolist(), strict=True)], bool
        )
        self.seats.learn(batch.slots[stay], counts[stay], batch.kind.least, batch.kind.most)

    def retire(self, request: Request) -> None:
        """Let go of a request that is done, wherever it is."""
        if request in self.running:
            self._unseat(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def spoiled(self, request: Request) -> bool:
        """Numbers that a request computed are not finite: nobody else may rely on its keys and values.

        In the step that computes them, attention spreads NaN to tokens before the one that it comes from, and
        so to pages that requests with the same beginning take from the cache. Whoever took such pages is
        computed again by itself, once: only what is not finite then is its own.

        Returns:
            Whether it was sent back to wait for that; what is under way for it counts for nothing.
        """
        if self.cache is not None:
            self.cache.forget(request.salt)
        if not request.borrowed or request.isolated:
            return False
        if request in self.running:
            self._unseat(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.isolate()
        self.waiting.add(request)
        return True

    def reset(self) -> None:
        """A step that was chosen did not run: end whatever relied on it, and forget what is cached."""
        for request in list(self.running):
            request.finish(ABORT)
            self._unseat(request)
        if self.cache is not None:
            self.cache.reset()

    def _collect(self) -> None:
        """Bring the generating rows up to date. One that may have come to its end waits until that is known."""
        if self._slots is _STALE:
            rows = [r for r, computed in self.running.items() if computed and r.slot >= 0]
            slots = np.array([r.slot for r in rows], np.int64)
            if self._gain > 1:
                going = self.seats.most_S[slots] < self.seats.limit_S[slots] - 1
                rows, slots = [r for r, g in zip(rows, going.tolist(), strict=True) if g], slots[going]
            self._decoding, self._slots = rows, slots

    def _relax(self) -> None:
        """Let the share of further tokens that pages are kept for fall."""
        first, least = self.options.new_token_ratio, self.options.min_new_token_ratio
        self._ratio = max(least, self._ratio - (1 - least) / DECAY_STEPS) if self.running else first

    def _grow(self) -> None:
        while True:
            self._collect()
            short = self.seats.short(self._slots)
            if not len(short):
                return
            if len(short) <= self.seats.available:
                break
            self._retract(min(self._seated(), key=self._worth))
        self.seats.grow(short)

    def _continue(self) -> list[Chunk]:
        """Chunks of prompts that are partly computed: all of them, or as much as a step holds."""
        chunks: list[Chunk] = []
        for request in self._prefilling:
            chunk = self._chunk(request, chunks)
            if chunk.count:
                self._share(chunks)
                chunks.append(chunk)
        return chunks

    def _admit(self, chunks: list[Chunk]) -> list[Request]:
        """Admit requests and add their first chunks; one that does not fit keeps all behind it waiting."""
        admitted: list[Request] = []
        free = self.seats.free
        # Pages that were just taken from one request are not for another to start with.
        if self.waiting and not self._retractions and (free or self.options.policy == PRIORITY):
            for request in self.waiting.order(max(1, free)):
                if self._room(chunks, request.scoring) <= 0:
                    break
                # What was chosen so far is shared before the next request looks for its prefix: samples of
                # one prompt, and prompts that begin alike, compute that once, even within one step.
                self._share(chunks)
                if not self._seat(request, chunks):
                    return admitted
                admitted.append(request)
                chunks.append(self._chunk(request, chunks))
        self._trim(chunks)
        self._share(chunks)
        return admitted

    def _seat(self, request: Request, chunks: Sequence[Chunk]) -> bool:
        """Give a waiting request its slot and pages, if need be those of others; False if it has to wait."""
        seats = self.seats
        while True:
            if seats.free and seats.enter(request, self._ratio):
                break
            if not self._preempt(request, chunks):
                return False
        self.waiting.admitted(request)
        if not request.retractions:
            request.cached_tokens = int(seats.least_S[request.slot])
        self.running[request] = False
        self._prefilling.append(request)
        return True

    def _preempt(self, request: Request, chunks: Sequence[Chunk]) -> bool:
        """Send a request of lower priority back to wait; False where none has to make way, or all would not do."""
        if self.options.policy != PRIORITY:
            return False
        highest = request.priority - self.options.preemption_threshold
        # Others may rely on pages that a chunk of this step is about to fill.
        stay = {chunk.request for chunk in chunks}
        lower = [r for r in self._seated() if r.priority <= highest and not r.urgent and r not in stay]
        if not lower or not self.seats.could_enter(request, lower):
            return False
        self._retract(min(lower, key=self._worth))
        return True

    def _retract(self, request: Request) -> None:
        """Send a running request back to wait. It will be computed again; its tokens stay as they are.

        A token that is being sampled for it reaches it while it waits.
        """
        self._unseat(request)
        request.retractions += 1
        self._retractions += 1
        self.waiting.add(request)
        # Keep pages for what those who run turned out to need so far, and a little more.
        made = sum(len(r.output) + AHEAD for r in self.running)
        most = sum(r.sampling.max_new_tokens for r in self.running)
        self._ratio = min(1.0, max(self._ratio, made / max(1, most)))

    def _unseat(self, request: Request) -> None:
        if request.slot >= 0:
            self.seats.leave(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
        del self.running[request]
        self._slots = _STALE

    def _seated(self) -> list[Request]:
        return [request for request in self.running if request.slot >= 0]

    def _worth(self, request: Request) -> tuple[bool, int, int, int]:
        """What is retracted last sorts last: urgent, high priority, many tokens to compute again, early arrival.

        The highest of all is never retracted, so one request always gets done.
        """
        priority = request.priority if self.options.policy == PRIORITY else 0
        return request.urgent, priority, len(request.output), -request.ticket

    def _room(self, chunks: Sequence[Chunk], scoring: bool) -> int:
        """Tokens of chunks that the step takes beside what is chosen; below 0 if it is too long to score."""
        self._collect()
        scoring = scoring or any(chunk.scores for chunk in chunks)
        room = self._steps[INPUT_LOGPROBS if scoring else EXTEND].tokens - len(self._decoding)
        return min(room, self.options.chunked_prefill_size or room) - sum(chunk.count for chunk in chunks)

    def _chunk(self, request: Request, chunks: Sequence[Chunk]) -> Chunk:
        """As much as the step takes of what is left of a request; nothing if it takes none."""
        start = int(self.seats.least_S[request.slot])
        left = request.length - start
        # Steps that report of their input hold fewer tokens: what comes before that is run without.
        before = request.scored - 1 - start if request.scoring else left
        count = max(0, min(left, before or left, self._room(chunks, scoring=not before)))
        count = self.seats.chunk(request.slot, start, count)
        scores = 0 if before else min(count, len(request.prompt) - 1 - start)
        return Chunk(request, start, count, count == left, scores)

    def _trim(self, chunks: list[Chunk]) -> None:
        """Cut the last chunk where two steps in smaller buckets are cheaper than one that is mostly padding.

        A step costs about as much as its bucket has tokens, and at least as much as ``max_rows`` of them.
        The generating rows run in the next step anyway.
        """
        if not chunks or any(chunk.scores for chunk in chunks):
            return
        self._collect()
        last, decoding = chunks[-1], len(self._decoding)
        rows, tokens = decoding + len(chunks), decoding + sum(chunk.count for chunk in chunks)
        smaller = max((size for most, size in self._extend if most >= rows and size < tokens), default=0)
        rest = tokens - smaller
        if rest >= last.count:
            return
        after = self._table.covering(EXTEND, decoding + 1, decoding + rest).tokens
        after = after - decoding if decoding else max(after, self.limits.max_rows)
        if smaller + after < self._table.covering(EXTEND, rows, tokens).tokens:
            count = self.seats.chunk(last.request.slot, last.start, last.count - rest)
            chunks[-1] = Chunk(last.request, last.start, count, last=False)

    def _share(self, chunks: Sequence[Chunk]) -> None:
        """Put what the last chunk completes into the prefix cache; those before it are there."""
        if chunks and not self.seats.states:
            self.seats.share(chunks[-1].request, chunks[-1].start + chunks[-1].count)


_STALE = np.zeros(0, np.int64)
