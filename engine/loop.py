"""The engine: receive, select, run, commit."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from makeready.engine.kv.pool import PagePool
from makeready.engine.request import ABORT, Request, TokenLogprob
from makeready.engine.scheduler import Batch, Scheduler
from makeready.engine.staging import slot_values, stage
from makeready.graphs.buckets import BucketTable
from makeready.graphs.executable.base import Executable


class Engine:
    """Runs requests on an executable. Sees buckets and pages; never a layer or a kernel."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self.limits = executable.plan.limits
        self.buckets = BucketTable(executable.plan.buckets)
        self.pool = PagePool(executable.pages)
        self.scheduler = Scheduler(self.limits, self.pool)

    @property
    def busy(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def submit(self, request: Request) -> None:
        """Queue a request; see :meth:`Scheduler.submit` for what is refused."""
        self.scheduler.submit(request)

    def abort(self, request: Request) -> None:
        """End a request where it stands."""
        if request.done:
            return
        request.finish(ABORT)
        if request in self.scheduler.running:
            self.scheduler.retire(request)
        else:
            self.scheduler.waiting.remove(request)

    def step(self) -> list[Request]:
        """Run one step and return the requests that it finished."""
        for request in self.scheduler.admit():
            request.admitted = time.perf_counter()
            self.executable.write_slot(request.slot, slot_values(request, self.limits))
        batch = self.scheduler.next()
        if batch is None:
            return []
        bucket = self.buckets.covering(batch.phase, len(batch.rows), batch.tokens)
        pending = self.executable.launch(bucket, stage(batch, bucket, self.limits))
        return self._commit(batch, pending.wait())

    def _commit(self, batch: Batch, results: Mapping[str, np.ndarray]) -> list[Request]:
        finished = []
        for row, (request, count) in enumerate(batch.rows):
            request.computed += count
            if request.pending:
                continue  # a chunk of a longer prompt: what was sampled after it means nothing
            request.append(int(results["tokens"][row]), _logprob(request, results, row))
            if request.done:
                self.scheduler.retire(request)
                finished.append(request)
        if not self.busy:
            self.pool.check()
            assert self.pool.held == 0, "pages are held though nothing runs"
        return finished


def _logprob(request: Request, results: Mapping[str, np.ndarray], row: int) -> TokenLogprob | None:
    if not request.sampling.return_logprob:
        return None
    count = request.sampling.top_logprobs_num
    ids, values = results["top_ids"][row, :count], results["top_values"][row, :count]
    top = tuple((i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True) if i >= 0)
    return TokenLogprob(int(results["tokens"][row]), float(results["logprob"][row]), top)
