"""Which sequences run next, and with how many of their tokens.

    grow        a page for every generating sequence that has filled its last one; pages may run out
    continue    the prompt that is partly computed
    admit       waiting sequences, while slots, pages and tokens of the step last
    launched    what was chosen counts as computed from here on

Nothing here waits for a token: what a step samples feeds the next on the device, and how long a sequence can
get at most is known. Only whether it ends before that is learned later, when results are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from makeready.engine.admission import Admission
from makeready.engine.batch import Batch, Chunk, asked_kind
from makeready.engine.errors import BusyError
from makeready.engine.kv.pools import Pools
from makeready.engine.kv.radix import PrefixCache
from makeready.engine.options import ALWAYS, NEVER, PRIORITY, SchedulerOptions
from makeready.engine.padding import Padding
from makeready.engine.policy import WaitingQueue
from makeready.engine.seats import Seats
from makeready.engine.sequence import ABORT, TokenSequence
from makeready.engine.steps.base import StepKind, step_kinds
from makeready.graphs.plan.spec import Bucket, Limits, StepSpec


class Scheduler:
    """Continuous batching: chunked prompts beside generating rows, a prefix cache, retraction.

    Args:
        limits, steps, buckets: of the plan.
        pools: the blocks of each cache group.
        options: what the user chose.

    Attributes:
        waiting: sequences without a slot.
        running: sequences with a slot, in order of admission, and those whose last token is being sampled;
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
        options.check_limits(limits)
        self.limits = limits
        self.options = options
        self.cache = PrefixCache(pools, limits.page_size, options.eviction) if options.prefix_cache else None
        self.running: dict[TokenSequence, bool] = {}
        self._kinds = step_kinds(steps, always=options.speculation == ALWAYS)
        if options.speculation == NEVER:
            self._kinds = [kind for kind in self._kinds if kind.most == 1]
        self._steps = steps
        self._gain = max(kind.most for kind in self._kinds)
        self.seats = Seats(
            limits, options.max_running_requests or limits.max_rows, pools, self.cache, self._gain
        )
        self.waiting = WaitingQueue(options, self.cache, limits.page_size, self.seats.running)
        self._admission = Admission(self.seats, limits, options)
        self._any = self._kinds[-1].name  # what takes any chunks
        self._padding = Padding(buckets, self._any, limits.max_rows)
        self._decoding: list[TokenSequence] = []
        self._slots = np.zeros(0, np.int64)  # of _decoding
        self._prefilling: list[TokenSequence] = []
        self._forced: list[TokenSequence] = []  # generating, with tokens that are known and not run
        self._retractions = 0  # for the step that is being chosen
        self._steps_without_prompts = options.decode_interval

    def check(self, sequence: TokenSequence) -> None:
        """Whether a sequence could ever run.

        Raises:
            RequestError: it is too long for the context, or for all pages together.
        """
        self._admission.check(sequence)

    def submit(self, sequence: TokenSequence) -> None:
        """Queue a sequence.

        Raises:
            RequestError: it could never run, see :meth:`check`; or too many wait already.
        """
        self.check(sequence)
        most = self.options.max_queued_requests
        if most is not None and len(self.waiting) >= most:
            raise BusyError(
                f"{most} requests wait already, as many as scheduler.max_queued_requests allows; try again later"
            )
        self.waiting.add(sequence)

    def next(self) -> Batch | None:
        """The next step's work; None where there is none, or none before results are read."""
        self._retractions = 0
        if self._gain > 1:
            self._slots = _STALE  # which rows may have come to their end changes with every result
            self._admission.changed()
        self._grow()
        chunks = self._force()
        admitted: list[TokenSequence] = []
        # Tokens per second of a step with few prompt tokens and of one with many differ little, the time until
        # it ends does: decode_interval says how often those who generate wait for the longer one.
        forced = len(chunks)
        if not self._decoding or self._steps_without_prompts >= self.options.decode_interval:
            self._continue(chunks)
            admitted = self._admit(chunks)
        self._steps_without_prompts = 0 if len(chunks) > forced else self._steps_without_prompts + 1
        self._collect()
        if not self._decoding and not chunks:
            return None
        kind = asked_kind(chunks) or next(k for k in self._kinds if k.takes(self._decoding, chunks))
        return Batch(self._decoding, self._slots, chunks, admitted, self._retractions, kind)

    def launched(self, batch: Batch) -> None:
        """The step runs, or is sure to: what it computes is relied on from here on."""
        seats = self.seats
        seats.advance(batch.slots, batch.kind.least, batch.kind.most)
        # Whose last token is being sampled has nothing left to run: the next sequence can have the seat.
        ended = [batch.decoding[row] for row in np.flatnonzero(seats.left_S[batch.slots] == 0).tolist()]
        self._admission.launched(bool(batch.chunks))
        if batch.chunks:
            self._ran(batch.chunks)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if chunk.kind is not None:
                chunk.kind.launched(chunk)
            if chunk.last:
                seats.left_S[sequence.slot] -= 1
                (self._prefilling if sequence in self._prefilling else self._forced).remove(sequence)
                self.running[sequence] = True
                self._slots = _STALE
                if not seats.left_S[sequence.slot]:
                    ended.append(sequence)
        for sequence in ended:
            seats.leave(sequence)
            self._slots = _STALE

    def _ran(self, chunks: list[Chunk]) -> None:
        """Chunks were launched. With states, what they complete can be shared now, for it is read by later steps."""
        seats = self.seats
        slots = np.array([chunk.sequence.slot for chunk in chunks])
        counts = np.array([chunk.count for chunk in chunks])
        seats.least_S[slots] += counts
        seats.most_S[slots] += counts
        seats.ran(slots)
        for chunk in chunks if seats.states else ():
            seats.share(chunk.sequence, chunk.start + chunk.count)

    @property
    def reads_history(self) -> bool:
        """Whether any step looks at all tokens of its sequences."""
        return any(kind.reads_history for kind in self._kinds)

    @property
    def forces(self) -> bool:
        """Whether generating rows may go on with tokens that nobody sampled for them."""
        return self.options.forced_tokens and all(kind.forces for kind in self._kinds)

    def forced(self, sequence: TokenSequence) -> None:
        """A sequence has tokens that nobody sampled; what is being sampled for it counts for nothing."""
        if sequence.slot < 0 or not self.running.get(sequence):
            return  # waits, or has only known tokens to run as it is
        self.running[sequence] = False
        self._forced.append(sequence)
        self.seats.left_S[sequence.slot] = sequence.left
        self._slots = _STALE

    def learned(self, batch: Batch, counts: np.ndarray, void: Collection[TokenSequence]) -> None:
        """By how much a step lengthened the generating rows, where only the device knew.

        Who has left its slot since then has nothing to learn. Nobody can have come back to it: who is sent back
        to wait is not admitted before the step that was under way is read. Of rows that are ``void`` the token that
        they had counts, and others run behind it.
        """
        rows = list(zip(batch.decoding, batch.slots.tolist(), strict=True))
        stay = np.array([sequence.slot == slot for sequence, slot in rows], bool)
        own = np.array([sequence not in void for sequence, _ in rows], bool)
        gained = np.where(own, counts, batch.kind.least)
        self.seats.learn(batch.slots[stay], gained[stay], batch.kind.least, batch.kind.most)
        batch.kind.learned([s for s in batch.decoding if s not in void], counts[own])

    def retire(self, sequence: TokenSequence) -> None:
        """Let go of a sequence, wherever it is."""
        if sequence in self.running:
            self._unseat(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._admission.ended(sequence)

    def spoiled(self, sequence: TokenSequence) -> bool:
        """Numbers that a sequence computed are not finite: nobody else may rely on its keys and values.

        In the step that computes them, attention spreads NaN to tokens before the one that it comes from, and
        so to pages that sequences with the same beginning take from the cache. Whoever took such pages is
        computed again by itself, once: only what is not finite then is its own.

        Returns:
            Whether it was sent back to wait for that; what is under way for it counts for nothing.
        """
        if self.cache is not None:
            self.cache.forget(sequence.salt)
        if not sequence.borrowed or sequence.isolated:
            return False
        self.retire(sequence)
        sequence.isolate()
        self.waiting.add(sequence)
        return True

    def reset(self) -> list[TokenSequence]:
        """A step that was chosen did not run: end whatever relied on it, and forget what is cached.

        Returns:
            Those that it ended.
        """
        ended = list(self.running)
        for sequence in ended:
            sequence.finish(ABORT)
            self._unseat(sequence)
        if self.cache is not None:
            self.cache.reset()
        return ended

    def _collect(self) -> None:
        """Bring the generating rows up to date. One that may have come to its end waits until that is known."""
        if self._slots is _STALE:
            rows = [s for s, computed in self.running.items() if computed and s.slot >= 0]
            slots = np.array([s.slot for s in rows], np.int64)
            if self._gain > 1:
                going = self.seats.most_S[slots] < self.seats.limit_S[slots] - 1
                rows, slots = [s for s, g in zip(rows, going.tolist(), strict=True) if g], slots[going]
            self._decoding, self._slots = rows, slots

    def _grow(self) -> None:
        while True:
            self._collect()
            slots = self._slots
            if self._forced:
                slots = np.append(slots, [sequence.slot for sequence in self._forced])
            short = self.seats.short(slots)
            if not len(short):
                return
            if len(short) <= self.seats.available:
                break
            self._retract(min(self._seated(), key=self._worth))
        self.seats.grow(short)

    def _force(self) -> list[Chunk]:
        """Chunks of tokens that nobody sampled, as far as a page more holds them: a step tells of one."""
        chunks: list[Chunk] = []
        for sequence in self._forced:
            chunk = self._chunk(sequence, chunks)
            count = min(chunk.count, self.seats.room_for(sequence.slot, chunk.count))
            if count:
                chunks.append(replace(chunk, count=count, last=chunk.last and count == chunk.count))
                self._share(chunks)
        return chunks

    def _continue(self, chunks: list[Chunk]) -> None:
        """Add chunks of prompts that are partly computed: all of them, or as much as a step holds."""
        for sequence in self._prefilling:
            chunk = self._chunk(sequence, chunks)
            if chunk.count:
                self._share(chunks)
                chunks.append(chunk)

    def _admit(self, chunks: list[Chunk]) -> list[TokenSequence]:
        """Admit sequences and add their first chunks; one that does not fit keeps all behind it waiting."""
        admitted: list[TokenSequence] = []
        free = self.seats.free
        # Pages that were just taken from one sequence are not for another to start with.
        if self.waiting and not self._retractions and (free or self.options.policy == PRIORITY):
            for sequence in self.waiting.order(max(1, free)):
                if self._room(chunks, self._claim(sequence)[0]) <= 0:
                    break
                # What was chosen so far is shared before the next sequence looks for its prefix: samples of
                # one prompt, and prompts that begin alike, compute that once, even within one step.
                self._share(chunks)
                if not self._seat(sequence, chunks):
                    return admitted
                admitted.append(sequence)
                chunks.append(self._chunk(sequence, chunks))
        self._trim(chunks)
        self._share(chunks)
        return admitted

    def _seat(self, sequence: TokenSequence, chunks: list[Chunk]) -> bool:
        """Give a waiting sequence its slot and pages, if need be those of others; False if it has to wait."""
        seats = self.seats
        while True:
            if seats.free and self._admission.enter(sequence):
                break
            if not self._preempt(sequence, chunks):
                return False
        self.waiting.admitted(sequence)
        if not sequence.retractions:
            sequence.cached_tokens = min(int(seats.least_S[sequence.slot]), len(sequence.prompt))
        self.running[sequence] = False
        self._prefilling.append(sequence)
        return True

    def _preempt(self, sequence: TokenSequence, chunks: list[Chunk]) -> bool:
        """Send a sequence of lower priority back to wait; False where none has to make way, or all would not do."""
        if self.options.policy != PRIORITY:
            return False
        highest = sequence.priority - self.options.preemption_threshold
        # Others may rely on pages that a chunk of this step is about to fill.
        stay = {chunk.sequence for chunk in chunks}
        lower = [s for s in self._seated() if s.priority <= highest and not s.urgent and s not in stay]
        if not lower or not self._admission.could_enter(sequence, lower):
            return False
        self._retract(min(lower, key=self._worth))
        return True

    def _retract(self, sequence: TokenSequence) -> None:
        """Send a running sequence back to wait. It will be computed again; its tokens stay as they are.

        A token that is being sampled for it reaches it while it waits.
        """
        self._unseat(sequence)
        sequence.retractions += 1
        self._retractions += 1
        self.waiting.add(sequence)

    def _unseat(self, sequence: TokenSequence) -> None:
        if sequence.slot >= 0:
            self.seats.leave(sequence)
        for listed in (self._prefilling, self._forced):
            if sequence in listed:
                listed.remove(sequence)
        del self.running[sequence]
        self._admission.changed()
        self._slots = _STALE

    def _seated(self) -> list[TokenSequence]:
        return [sequence for sequence in self.running if sequence.slot >= 0]

    def _worth(self, sequence: TokenSequence) -> tuple[bool, int, int, int]:
        """What is retracted last sorts last: urgent, high priority, many tokens to compute again, early arrival.

        The highest of all is never retracted, so one sequence always gets done.
        """
        priority = sequence.priority if self.options.policy == PRIORITY else 0
        return sequence.urgent, priority, len(sequence.output), -sequence.ticket

    def _claim(self, sequence: TokenSequence) -> tuple[StepKind | None, int]:
        """The kind of step that has to run some of a sequence's tokens, and the first of them."""
        for kind in self._kinds:
            first = kind.claims(sequence)
            if first is not None:
                return kind, first
        return None, sequence.length

    def _room(self, chunks: list[Chunk], kind: StepKind | None) -> int:
        """Tokens that the step takes beside what is chosen, if it has to be of a kind; 0 or less for none."""
        self._collect()
        asked = asked_kind(chunks) or kind
        if kind is not None and asked is not kind:
            return 0
        room = self._steps[asked.name if asked else self._any].tokens - len(self._decoding)
        return min(room, self.options.chunked_prefill_size or room) - sum(chunk.count for chunk in chunks)

    def _chunk(self, sequence: TokenSequence, chunks: list[Chunk]) -> Chunk:
        """As much as the step takes of what is left of a sequence; nothing if it takes none."""
        start = int(self.seats.least_S[sequence.slot])
        left = count = sequence.length - start
        kind, first = self._claim(sequence)
        if (
            start < first
        ):  # steps of a kind that is asked for may hold fewer tokens: what comes before is run without
            kind, count = None, first - start
        count = max(0, min(count, self._room(chunks, kind)))
        count = self.seats.cut(sequence.slot, start, count)
        return Chunk(sequence, start, count, count == left, kind)

    def _trim(self, chunks: list[Chunk]) -> None:
        """Cut the last chunk where two steps in smaller buckets are cheaper than one that is mostly padding."""
        if not chunks or asked_kind(chunks) or chunks[-1].sequence in self._forced:
            return
        self._collect()
        last, decoding = chunks[-1], len(self._decoding)
        rest = self._padding.left_over(decoding, chunks)
        if rest:
            count = self.seats.cut(last.sequence.slot, last.start, last.count - rest)
            chunks[-1] = Chunk(last.sequence, last.start, count, last=False)

    def _share(self, chunks: list[Chunk]) -> None:
        """Put what the last chunk completes into the prefix cache; those before it are there."""
        if chunks and not self.seats.states:
            self.seats.share(chunks[-1].sequence, chunks[-1].start + chunks[-1].count)


_STALE = np.zeros(0, np.int64)
