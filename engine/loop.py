"""The engine: receive, select, run, commit."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from makeready.engine.batch import Batch
from makeready.engine.constraint import Constraint
from makeready.engine.errors import RequestError
from makeready.engine.kv.pools import Pools
from makeready.engine.masks import Masks
from makeready.engine.options import SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.scheduler import Scheduler
from makeready.engine.sequence import ABORT, ERROR, TokenSequence
from makeready.engine.staging import Stage, slot_values
from makeready.engine.step_record import StepRecord
from makeready.engine.steps.base import Drafts
from makeready.graphs.executable.base import Executable, Pending
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.spec import Bucket


@dataclass(frozen=True)
class _Flight:
    """A step that was launched and not read, and when it was planned, staged, and launched.

    ``void`` are sequences for which its results count for nothing, ``drafts`` for how many rows tokens were
    guessed, how many, and how many were right.
    """

    batch: Batch
    bucket: Bucket
    pending: Pending
    planned: float
    staged: float
    launched: float
    void: set[TokenSequence] = field(default_factory=set)
    drafts: list[int] = field(default_factory=lambda: [0, 0, 0])


class Engine:
    """Runs sequences on an executable. Sees buckets and pages; never a layer or a kernel.

    What a sequence comes to is written to its reply, where it has one: tokens are the sequence's own, text and
    log-probabilities the reply's.

    Args:
        executable: a loaded plan.
        options: how sequences share it.

    Attributes:
        observer: told of every step when its results were taken in, if not None.
        on_chunk: told of every chunk of a prompt that was run, its first token and how many, before ``observer`` is
            told of the step, if not None.
        closed: whether everything was given back.

    Raises:
        RequestError: the options do not fit the plan.
    """

    def __init__(self, executable: Executable, options: SchedulerOptions | None = None) -> None:
        self.executable = executable
        self.options = options or SchedulerOptions()
        self.options.check(executable.plan)
        plan = executable.plan
        self.limits = plan.limits
        self.buckets = BucketTable(plan.buckets)
        blocks = {**executable.blocks, plan.kv.groups[0].name: executable.pages}
        self.pools = Pools(plan.kv, blocks, self.options.eviction)
        self.pool = self.pools.first
        self.scheduler = Scheduler(plan.limits, plan.steps, plan.buckets, self.pools, self.options)
        self._reads_history = self.scheduler.reads_history
        self.observer: Callable[[StepRecord], None] | None = None
        self.on_chunk: Callable[[Reply, int, int], None] | None = None
        self._stage = Stage(plan.steps, plan.limits.null_slot)
        self._flights: deque[_Flight] = deque()
        self._replies: dict[TokenSequence, Reply] = {}
        self._following: dict[TokenSequence, Reply] = {}  # of those that ran, what follows the tokens
        self._constrained: set[TokenSequence] = set()  # in the queue or running
        self._masks = Masks(plan.limits)
        self.closed = False
        self._ahead = 1 if self.options.overlap and executable.asynchronous else 0

    @property
    def busy(self) -> bool:
        """Whether any sequence is queued or running."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def room(self) -> int:
        """Sequences that may still be queued before further ones are refused."""
        most = self.options.max_queued_requests
        return sys.maxsize if most is None else max(0, most - len(self.scheduler.waiting))

    def submit(self, sequence: TokenSequence, reply: Reply | None = None) -> None:
        """Queue a sequence; see :meth:`Scheduler.submit` for what is refused."""
        if self.closed:
            raise RequestError("the model is closed; load it again")
        self.scheduler.submit(sequence)
        if reply is not None:
            self._replies[sequence] = reply
        if sequence.constraint is not None:
            self._constrained.add(sequence)
            if self.scheduler.forces:
                sequence.force(begins=True)

    def close(self) -> None:
        """End all sequences and give back what the executable holds; does nothing the second time."""
        if self.closed:
            return
        self.closed = True
        try:
            for sequence in (*self.scheduler.running, *self.scheduler.waiting):
                self.abort(sequence)
        finally:
            self._flights.clear()
            self.executable.close()

    def abort(self, sequence: TokenSequence) -> None:
        """End a sequence where it stands, waiting or running; nothing if it is done."""
        if not sequence.done:
            sequence.finish(ABORT)
            self._ended(sequence)

    def forget(self) -> int:
        """Drop cached prefixes that no sequence holds; returns how many pages that were."""
        cache, before = self.scheduler.seats.cache, self.pool.cached
        if cache is not None:
            cache.reset()
        return before - self.pool.cached

    def step(self) -> list[TokenSequence]:
        """Launch a step and read one: with overlap, the one that was launched by the call before.

        A call that is interrupted ends the sequences that run; those that wait are left as they are.

        Returns:
            Sequences that were ended by what was read.
        """
        finished = self._read(self._ahead)
        batch, began = None, time.perf_counter()
        try:
            batch = self.scheduler.next()
            if batch is not None:
                finished += self._launch(batch, began)
        except BaseException:
            for sequence in self.scheduler.reset():
                self._ended(sequence)
            raise
        finished += self._read(self._ahead if batch is not None else 0)
        if not self.busy:
            self.pools.check()
            assert not any(pool.held for pool in self.pools.by_name.values()), "held though nothing runs"
        return finished

    def _launch(self, batch: Batch, began: float) -> list[TokenSequence]:
        """Start a step; returns the sequences that ended by what had to be read for it."""
        planned, seats = time.perf_counter(), self.scheduler.seats
        admitted = set(batch.admitted)
        for chunk in batch.chunks:
            if chunk.sequence in admitted:
                self._admit(chunk.sequence, planned)
            elif not seats.windows:  # a chunk may need more pages of a window than its step can tell of
                continue
            self._tell(chunk.sequence, chunk.start)
        bucket = self.buckets.covering(batch.kind.name, batch.rows, batch.tokens)
        batch.kind.stage(batch, seats, self._stage)
        # A sequence whose last token this is leaves its slot when the step is launched.
        masked = [(s, s.slot) for s in batch.sampled if s.constraint is not None] if self._constrained else []
        pending = self.executable.launch(bucket, self._stage.filled(bucket), cut=bool(masked))
        self._flights.append(_Flight(batch, bucket, pending, began, planned, time.perf_counter()))
        self.scheduler.launched(batch)
        return self._resume(masked) if masked else []

    def _resume(self, masked: list[tuple[TokenSequence, int]]) -> list[TokenSequence]:
        """Let a step go on that stands at its cut, where masks are wanted for these sequences in their slots.

        Meanwhile its first part runs, and the step before is read: its tokens say what may come now.
        """
        finished: list[TokenSequence] = []
        late: dict[int, Mapping[str, Any]] = {}
        try:
            finished = self._read(1)
            flight = self._flights[-1]
            rows = [
                (s, slot, s.constraint)
                for s, slot in masked
                if not (s.done or s in flight.void) and s.constraint
            ]
            pairs = [(s, constraint) for s, _, constraint in rows]
            masks = self._masks.of(flight.batch, flight.pending, pairs, forces=self.scheduler.forces)
            for (sequence, slot, constraint), of_row in zip(rows, masks, strict=True):
                if constraint.error is not None:
                    sequence.finish(ERROR)
                    finished.append(sequence)
                    self._ended(sequence)
                elif (changed := self._masks.changed(slot, sequence.length, of_row)) is not None:
                    late[slot] = {"allowed": changed}
        finally:
            self.executable.resume(late)
        return finished

    def _admit(self, sequence: TokenSequence, now: float) -> None:
        """A sequence begins to run, for the first time or again."""
        reply = self._replies.get(sequence)
        if reply is not None:
            reply.admitted = reply.admitted or now
            if reply.follows:
                self._following[sequence] = reply

    def _tell(self, sequence: TokenSequence, computed: int) -> None:
        """Write a sequence's slot on the device."""
        seats = self.scheduler.seats
        pages = seats.page_lists(sequence.slot)
        seats.told_S[sequence.slot] = seats.held_S[sequence.slot]  # those that it grew by are among them
        self.executable.write_slot(
            sequence.slot,
            slot_values(sequence, computed, pages, self.executable.plan, history=self._reads_history),
        )

    def _read(self, ahead: int) -> list[TokenSequence]:
        """Read steps until only ``ahead`` are under way; returns the sequences that they ended."""
        finished: list[TokenSequence] = []
        while len(self._flights) > ahead:
            flight, began = self._flights[0], time.perf_counter()
            results = flight.pending.wait()
            self._flights.popleft()
            read = time.perf_counter()
            kept, done = self._commit(flight, results)
            finished += done
            if self.observer is not None:
                self.observer(self._record(flight, kept, began, read))
        return finished

    def _commit(self, flight: _Flight, results: Mapping[str, np.ndarray]) -> tuple[int, list[TokenSequence]]:
        """Give tokens to their sequences, then to replies; how many were kept, and who is ended by them."""
        batch, ended = flight.batch, list[TokenSequence]()
        counts, drafts = batch.kind.counts(batch, results), batch.kind.drafts(batch, results)
        if counts is not None:
            self.scheduler.learned(batch, counts, flight.void)
        if drafts is not None:
            self._note_drafts(flight, drafts)
        if self._following:  # log-probabilities of output are of tokens that are not taken in yet
            self._report(flight, results, ended)
        kept = self._take(flight, results, ended)
        if batch.chunks:
            self._note_chunks(batch)
        if self._following:
            kept -= self._follow(ended)
        for sequence in ended:
            self._ended(sequence)
        return kept, ended

    def _take(self, flight: _Flight, results: Mapping[str, np.ndarray], ended: list[TokenSequence]) -> int:
        """Append tokens to their sequences; returns how many, and adds to ``ended`` whom they end."""
        batch, void, kept = flight.batch, flight.void, 0
        forced: dict[TokenSequence, Constraint] = {}
        for sequence, token in batch.kind.tokens(batch, results):
            if sequence.finish_reason is not None or (void and sequence in void):
                continue  # a token before this one ended it, or it was aborted or sent back
            if token < 0:
                self._spoiled(sequence, f"output token {len(sequence.output)}", flight, ended)
                continue
            kept += 1
            if sequence in forced:  # it was asked for these before the token's mask was made
                forced[sequence].forced()
            if sequence.append(token):
                ended.append(sequence)
                kept -= not sequence.output  # of a prompt alone, log-probabilities were asked for
            elif sequence.constraint is not None and self.scheduler.forces:
                forced[sequence] = sequence.constraint
        for sequence in forced:
            if not sequence.done and sequence not in void:
                kept += self._force(sequence, ended)
        return kept

    def _force(self, sequence: TokenSequence, ended: list[TokenSequence]) -> int:
        """Let a sequence go on with the tokens that are sure to come, in its next step; returns how many."""
        # A step that is under way samples the first of them.
        count = sequence.force(least=2 if self._flights else 1)
        if sequence.done:
            ended.append(sequence)
        elif count:
            self.scheduler.forced(sequence)
            for later in self._flights:  # samples a token that is known now
                later.void.add(sequence)
        return count

    def _note_drafts(self, flight: _Flight, drafts: Drafts) -> None:
        """Count what was guessed, and what of it was right."""
        for sequence, drafted, accepted in zip(flight.batch.decoding, *drafts, strict=True):
            if not sequence.done and sequence not in flight.void:
                sequence.verify_steps += 1
                sequence.drafted += drafted
                sequence.accepted += accepted
        guessed = sum(drafted > 0 for drafted in drafts.drafted)
        flight.drafts[:] = guessed, sum(drafts.drafted), sum(drafts.accepted)

    def _note_chunks(self, batch: Batch) -> None:
        """Chunks were run; first tokens come with the last one of a prompt."""
        now = time.perf_counter()
        for chunk in batch.chunks:
            reply = self._replies.get(chunk.sequence)
            if reply is None:
                continue
            if chunk.sequence.output:
                reply.first_token = reply.first_token or now
            if self.on_chunk is not None:
                self.on_chunk(reply, chunk.start, chunk.count)

    def _follow(self, ended: list[TokenSequence]) -> int:
        """Let replies read new tokens; returns how many are behind the ends of texts, which sequences lose."""
        lost = 0
        for sequence, reply in list(self._following.items()):
            going_on = not sequence.done
            lost += reply.read()
            if going_on and sequence.done:
                ended.append(sequence)
        return lost

    def _report(self, flight: _Flight, results: Mapping[str, np.ndarray], ended: list[TokenSequence]) -> None:
        """Give log-probabilities to replies that want them."""
        void = flight.void
        wanted = {s for s in self._following if s.sampling.return_logprob and not s.done and s not in void}
        if not wanted:
            return
        for sequence, place, logprob in flight.batch.kind.reports(flight.batch, results, wanted):
            if sequence.done or sequence in void:
                continue
            if place < len(sequence.prompt) and math.isnan(logprob.logprob or 0.0):
                self._spoiled(sequence, f"prompt token {place}", flight, ended)
            else:
                self._following[sequence].report(place, logprob)

    def _spoiled(
        self, sequence: TokenSequence, token: str, flight: _Flight, ended: list[TokenSequence]
    ) -> None:
        """A sequence has NaN or infinities: it is computed again if another may have made them, or ends."""
        reply = self._replies.get(sequence)
        if self.scheduler.spoiled(sequence):
            for under_way in (flight, *self._flights):
                under_way.void.add(sequence)
            if reply is not None:
                reply.restart()
            return
        sequence.finish(ERROR)
        ended.append(sequence)
        if reply is not None:
            reply.fail(
                f"the logits of {token} are not finite: the model's weights are damaged or its activations overflow; "
                "check the checkpoint, or compile the plan with another plan.activation_dtype or plan.weight_dtype"
            )

    def _ended(self, sequence: TokenSequence) -> None:
        """A sequence has come to its end: the device has nothing more to do with it, and its reply is final."""
        self.scheduler.retire(sequence)
        self._constrained.discard(sequence)
        self._following.pop(sequence, None)
        reply = self._replies.pop(sequence, None)
        if reply is not None:
            reply.finish()

    def _record(self, flight: _Flight, kept: int, began: float, read: float) -> StepRecord:
        batch, admitted = flight.batch, set(flight.batch.admitted)
        return StepRecord(
            bucket=flight.bucket,
            rows=batch.rows,
            tokens=batch.tokens,
            prompt_tokens=batch.chunk_tokens,
            cached_tokens=sum(chunk.start for chunk in batch.chunks if chunk.sequence in admitted),
            new_tokens=kept,
            drafts=flight.drafts[0],
            drafted=flight.drafts[1],
            accepted=flight.drafts[2],
            retractions=batch.retractions,
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            free=self.pool.free,
            cached=self.pool.cached,
            held=self.pool.held,
            plan_start=flight.planned,
            launch_start=flight.staged,
            launch_end=flight.launched,
            wait_start=began,
            results_read=read,
            commit_end=time.perf_counter(),
        )
