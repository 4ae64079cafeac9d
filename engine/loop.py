"""The engine: receive, select, run, commit."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from makeready.engine.kv.pool import PagePool
from makeready.engine.options import SchedulerOptions
from makeready.engine.request import ABORT, Request, TokenLogprob
from makeready.engine.scheduler import Batch, Scheduler
from makeready.engine.staging import Stage, slot_values
from makeready.engine.step_record import StepRecord
from makeready.graphs.buckets import BucketTable
from makeready.graphs.executable.base import Executable, Pending
from makeready.graphs.spec import SCORE, TARGET_RESULTS, Bucket


@dataclass(frozen=True)
class _Flight:
    """A step that was launched and not read, and when it was planned, staged, and launched.

    ``void`` are requests for which its results count for nothing.
    """

    batch: Batch
    bucket: Bucket
    pending: Pending
    planned: float
    staged: float
    launched: float
    void: set[Request] = field(default_factory=set)


class Engine:
    """Runs requests on an executable. Sees buckets and pages; never a layer or a kernel.

    Args:
        executable: a loaded plan.
        options: how requests share it.

    Attributes:
        observer: told of every step when its results were taken in, if not None.

    Raises:
        RequestError: the options do not fit the plan.
    """

    def __init__(self, executable: Executable, options: SchedulerOptions | None = None) -> None:
        self.executable = executable
        self.options = options or SchedulerOptions()
        self.options.check(executable.plan)
        self.limits = executable.plan.limits
        self.buckets = BucketTable(executable.plan.buckets)
        self.pool = PagePool(executable.pages)
        self.scheduler = Scheduler(self.limits, executable.plan.buckets, self.pool, self.options)
        self.observer: Callable[[StepRecord], None] | None = None
        self._stage = Stage(self.limits, self.scheduler.seats)
        self._flights: deque[_Flight] = deque()
        self._ahead = 1 if self.options.overlap and executable.asynchronous else 0

    @property
    def busy(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def room(self) -> int:
        """Requests that may still be queued before further ones are refused."""
        most = self.options.max_queued_requests
        return sys.maxsize if most is None else max(0, most - len(self.scheduler.waiting))

    def submit(self, request: Request) -> None:
        """Queue a request; see :meth:`Scheduler.submit` for what is refused."""
        self.scheduler.submit(request)

    def abort(self, request: Request) -> None:
        """End a request where it stands, waiting or running; nothing if it is done."""
        if not request.done:
            request.finish(ABORT)
            self.scheduler.retire(request)

    def step(self) -> list[Request]:
        """Launch a step and read one: with overlap, the one that was launched by the call before.

        A call that is interrupted ends the requests that run; those that wait are left as they are.

        Returns:
            Requests that are finished by what was read.
        """
        finished = self._read(self._ahead)
        batch, began = None, time.perf_counter()
        try:
            batch = self.scheduler.next()
            if batch is not None:
                self._launch(batch, began)
        except BaseException:
            self.scheduler.reset()
            raise
        finished += self._read(self._ahead if batch is not None else 0)
        if not self.busy:
            self.pool.check()
            assert self.pool.held == 0, "pages are held though nothing runs"
        return finished

    def _launch(self, batch: Batch, began: float) -> None:
        planned = time.perf_counter()
        for request, chunk in zip(batch.admitted, batch.chunks[-len(batch.admitted) :], strict=False):
            request.admitted = request.admitted or planned
            self.executable.write_slot(request.slot, slot_values(request, chunk.start, self.limits))
        bucket = self.buckets.covering(batch.phase, batch.rows, batch.tokens)
        pending = self.executable.launch(bucket, self._stage.fill(batch, bucket))
        self._flights.append(_Flight(batch, bucket, pending, began, planned, time.perf_counter()))
        self.scheduler.launched(batch)

    def _read(self, ahead: int) -> list[Request]:
        """Read steps until only ``ahead`` are under way; returns the requests that they finished."""
        finished: list[Request] = []
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

    def _commit(self, flight: _Flight, results: Mapping[str, np.ndarray]) -> tuple[int, list[Request]]:
        """Give tokens to their requests; how many were kept, and who is finished by them."""
        batch, finished = flight.batch, list[Request]()
        if batch.phase == SCORE:
            for request, at in _score(flight, results):
                finished += self._spoiled(request, f"the logits of prompt token {at}", flight)
        kept, tokens = 0, results["tokens"].tolist()
        for row, request in batch.sampling():
            if request.finish_reason is not None or request in flight.void:
                continue  # the step before this one ended it, or it was aborted or sent back
            if tokens[row] < 0:
                finished += self._spoiled(
                    request, f"the logits of output token {len(request.output)}", flight
                )
                continue
            kept += 1
            logprob = None
            if request.sampling.return_logprob:
                logprob = _logprob(request, tokens[row], (results[name][row] for name in _OUTPUT))
            request.append(tokens[row], logprob)
            if request.finish_reason is not None:
                self.scheduler.retire(request)
                finished.append(request)
        return kept, finished

    def _spoiled(self, request: Request, what: str, flight: _Flight) -> list[Request]:
        """A request has NaN or infinities: it is computed again if another may have made them, or ends."""
        if self.scheduler.spoiled(request):
            for under_way in (flight, *self._flights):
                under_way.void.add(request)
            return []
        request.fail(
            f"{what} are not finite: the model's weights are damaged or its activations overflow; check the "
            "checkpoint, or compile the plan with another plan.activation_dtype or plan.weight_dtype"
        )
        self.scheduler.retire(request)
        return [request]

    def _record(self, flight: _Flight, kept: int, began: float, read: float) -> StepRecord:
        batch, admitted = flight.batch, set(flight.batch.admitted)
        return StepRecord(
            bucket=flight.bucket,
            rows=batch.rows,
            tokens=batch.tokens,
            prompt_tokens=batch.chunk_tokens,
            cached_tokens=sum(chunk.start for chunk in batch.chunks if chunk.request in admitted),
            new_tokens=kept,
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


_OUTPUT = ("logprob", "top_ids", "top_values")


def _score(flight: _Flight, results: Mapping[str, np.ndarray]) -> list[tuple[Request, int]]:
    """Give log-probabilities of prompts to their requests; returns whose are NaN, and from which token on."""
    batch, spoiled = flight.batch, list[tuple[Request, int]]()
    begin = len(batch.decoding)
    for chunk in batch.chunks:
        request = chunk.request
        for i in range(0 if request.done or request in flight.void else chunk.scores):
            at = chunk.start + 1 + i
            token, of = request.prompt[at], (results[n][begin + i] for n in TARGET_RESULTS)
            found = _logprob(request, token, of)
            if math.isnan(found.logprob or 0.0):
                spoiled.append((request, at))
                break
            request.input_logprobs.append(found)
        begin += chunk.count
    return spoiled


def _logprob(request: Request, token: int, results: Iterable[np.ndarray]) -> TokenLogprob:
    """What a step says of ``token``: its log-probability, and ids and log-probabilities of its rivals."""
    logprob, ids, values = results
    count = request.sampling.top_logprobs_num
    pairs = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
    return TokenLogprob(token, float(logprob), tuple((i, value) for i, value in pairs if i >= 0))
