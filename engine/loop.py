"""The engine: receive, select, run, commit."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from makeready.engine.batch import Batch
from makeready.engine.errors import RequestError
from makeready.engine.kv.pools import Pools
from makeready.engine.options import SchedulerOptions
from makeready.engine.request import ABORT, Request
from makeready.engine.scheduler import Scheduler
from makeready.engine.staging import Stage, slot_values
from makeready.engine.step_record import StepRecord
from makeready.graphs.executable.base import Executable, Pending
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.spec import Bucket


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
        self.observer: Callable[[StepRecord], None] | None = None
        self._stage = Stage(plan.steps, plan.limits.null_slot)
        self._flights: deque[_Flight] = deque()
        self.closed = False
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
        if self.closed:
            raise RequestError("the model is closed; load it again")
        self.scheduler.submit(request)

    def close(self) -> None:
        """End all requests and give back what the executable holds; does nothing the second time."""
        if self.closed:
            return
        self.closed = True
        try:
            for request in (*self.scheduler.running, *self.scheduler.waiting):
                self.abort(request)
        finally:
            self._flights.clear()
            self.executable.close()

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
            self.pools.check()
            assert not any(pool.held for pool in self.pools.by_name.values()), "held though nothing runs"
        return finished

    def _launch(self, batch: Batch, began: float) -> None:
        planned, seats = time.perf_counter(), self.scheduler.seats
        for request, chunk in zip(batch.admitted, batch.chunks[-len(batch.admitted) :], strict=False):
            request.admitted = request.admitted or planned
            self._tell(request, chunk.start)
        if seats.windows:  # a chunk may need more pages than its step can tell of
            for chunk in batch.chunks:
                if chunk.request not in batch.admitted:
                    self._tell(chunk.request, chunk.start)
        bucket = self.buckets.covering(batch.kind.name, batch.rows, batch.tokens)
        batch.kind.stage(batch, seats, self._stage)
        pending = self.executable.launch(bucket, self._stage.filled(bucket))
        self._flights.append(_Flight(batch, bucket, pending, began, planned, time.perf_counter()))
        self.scheduler.launched(batch)

    def _tell(self, request: Request, computed: int) -> None:
        """Write a request's slot on the device."""
        pages = self.scheduler.seats.page_lists(request.slot)
        self.executable.write_slot(request.slot, slot_values(request, computed, pages, self.executable.plan))

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
        counts = batch.kind.counts(batch, results)
        if counts is not None:
            self.scheduler.learned(batch, counts)
        kept, void = 0, flight.void
        for request, token, logprob in batch.kind.commit(batch, results, void):
            if request.finish_reason is not None or (void and request in void):
                continue  # a token before this one ended it, or it was aborted or sent back
            if isinstance(token, str):
                finished += self._spoiled(request, token, flight)
                continue
            kept += 1
            request.append(token, logprob)
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
