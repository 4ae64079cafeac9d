"""What the engine does, for whoever watches: steps, requests and their lives, latencies.

Steps are those that the engine tells of anyway. Chunks of prompts it tells of while somebody watches, and nothing is
kept here while nobody does.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from makeready.engine.reply import Reply
from makeready.engine.sequence import ABORT
from makeready.engine.step_record import StepRecord

if TYPE_CHECKING:
    from makeready.engine.server.service import Running, Service

EVERY_SECONDS = 0.1  # between two events
STEPS = 1024  # that are kept for watchers who are late
SAMPLES = 100  # of those under way, and of those that ended, the latest that are told
CHUNKS = 256  # of a prompt that are kept, the latest

Row: TypeAlias = dict[str, Any]
Predict: TypeAlias = Callable[[], Awaitable[Row | None]]
"""What steps are predicted to take; see :mod:`makeready.engine.server.predicted`."""


class Live:
    """Collects while :meth:`events` has readers.

    Times in what it tells are seconds since it was made.

    Args:
        predict: asked once, when somebody watches for the first time.
    """

    def __init__(self, service: Service, predict: Predict | None = None) -> None:
        self._service, self._predict = service, predict
        self._zero = time.perf_counter()
        self._watchers = 0
        self._read = 0.0
        self._count = 0
        self._steps: deque[Row] = deque(maxlen=STEPS)
        self._chunks: dict[Reply, deque[list[float]]] = {}
        self._ended: deque[Row] = deque(maxlen=SAMPLES)
        self._predicted: asyncio.Task[Row | None] | None = None

    @property
    def watched(self) -> bool:
        """Whether anybody watches."""
        return self._watchers > 0

    def step(self, record: StepRecord) -> None:
        """Take a step in."""
        began, self._read = max(self._read, record.launch_start), record.results_read
        if not self._watchers:
            return
        late = time.perf_counter() - record.commit_end  # clocks of two processes need not agree
        self._count += 1
        self._steps.append(
            {
                "number": self._count,
                "kind": record.bucket.phase,
                "bucket": str(record.bucket),
                "bucket_tokens": record.bucket.tokens,
                "rows": record.rows,
                "tokens": record.tokens,
                "prompt_tokens": record.prompt_tokens,
                "cached_tokens": record.cached_tokens,
                "new_tokens": record.new_tokens,
                "drafted_tokens": record.drafted,
                "accepted_tokens": record.accepted,
                "retractions": record.retractions,
                "waiting": record.waiting,
                "running": record.running,
                "free": record.free,
                "cached": record.cached,
                "held": record.held,
                "at": self._since(record.results_read + late),
                "seconds": record.results_read - began,
                "host_seconds": record.launch_end
                - record.plan_start
                + record.commit_end
                - record.results_read,
            }
        )

    def ended(self, running: Running) -> None:
        """Keep what became of a request that is no longer under way."""
        for index, reply in enumerate(running.replies):
            if self._watchers:
                row = self._row(running, index, reply)
                row["chunks"] = list(self._chunks.get(reply, ()))
                self._ended.append(row | ({} if reply.done else {"state": "done", "reason": ABORT}))
            self._chunks.pop(reply, None)

    async def events(self) -> AsyncGenerator[Row, None]:
        """What is new, ten times a second; the first says what does not change."""
        self._watchers += 1
        if self._watchers == 1:
            self._service.client.on_chunk = self._chunk
            self._service.client.watch(True)
        if self._predict is not None and self._predicted is None:
            self._predicted = asyncio.ensure_future(self._predict())
        try:
            yield self._constant()
            predicted, told, step = self._predicted, dict[str, tuple[Any, ...]](), 0
            while True:
                event = self._now(step, told)
                step = self._count
                if predicted is not None and predicted.done():
                    event["predicted"], predicted = predicted.result(), None
                yield event
                await asyncio.sleep(EVERY_SECONDS)
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._service.client.watch(False)
                self._chunks.clear()
                self._steps.clear()
                self._ended.clear()

    async def close(self) -> None:
        """Stop predicting."""
        if self._predicted is not None:
            self._predicted.cancel()
            await asyncio.gather(self._predicted, return_exceptions=True)

    def _constant(self) -> Row:
        service, loaded = self._service, self._service.loaded
        limits, facts = loaded.limits, loaded.facts
        return {
            "model": service.name,
            "plan": loaded.plan,
            "target": facts.get("target"),
            "device": facts.get("device"),
            "max_rows": limits.max_rows,
            "max_tokens": limits.max_tokens,
            "context_len": limits.context_len,
            "page_size": limits.page_size,
            "pages": facts["kv_pages"],
        }

    def _now(self, step: int, told: dict[str, tuple[Any, ...]]) -> Row:
        """What is new since a step; ``told`` is what this watcher knows of each sample."""
        service = self._service
        rows = list[Row]()
        for row, chunks in self._rows():
            known = (row["state"], row["output_tokens"], len(chunks), row["finished"])
            before = told.get(row["key"])
            if known != before:
                told[row["key"]] = known
                rows.append(row if before and before[2] == len(chunks) else {**row, "chunks": list(chunks)})
        return {
            "now": self._since(time.perf_counter()),
            "waiting": service.client.waiting,
            "running": service.client.running,
            "pages": service.client.pages,
            "steps": [each for each in self._steps if each["number"] > step],
            "requests": rows,
            "latencies": service.metrics.latencies(),
        }

    def _rows(self) -> list[tuple[Row, Any]]:
        """Samples that ended or are under way, the latest of either."""
        rows: list[tuple[Row, Any]] = [(row, row["chunks"]) for row in self._ended]
        under_way = sorted(self._service.running, key=lambda running: running.key)[-SAMPLES:]
        samples = [(run, index, reply) for run in under_way for index, reply in enumerate(run.replies)]
        for running, index, reply in samples[-SAMPLES:]:
            rows.append((self._row(running, index, reply), self._chunks.get(reply, ())))
        return rows

    def _row(self, running: Running, index: int, reply: Reply) -> Row:
        sequence, chunks = reply.sequence, self._chunks.get(reply)
        first = chunks[0] if chunks else None
        cached = sequence.cached_tokens if reply.done or first is None else int(first[0])
        admitted = first[2] if first is not None else self._maybe(reply.admitted)
        state = "waiting" if admitted is None else "prefill"
        if sequence.output:
            state = "decode"
        return {
            "key": f"{running.key}.{index}",
            "id": running.id,
            "sample": index,
            "state": "done" if reply.done else state,
            "prompt_tokens": len(sequence.prompt),
            "cached_tokens": cached,
            "output_tokens": len(sequence.output),
            "most_tokens": sequence.most,
            "retractions": sequence.retractions,
            "reason": sequence.finish_reason,
            "arrived": self._since(reply.arrived),
            "admitted": admitted,
            "first_token": self._maybe(reply.first_token),
            "finished": self._maybe(reply.finished),
        }

    def _chunk(self, reply: Reply, start: int, tokens: int, begin: float, end: float) -> None:
        chunks = self._chunks.setdefault(reply, deque(maxlen=CHUNKS))
        chunks.append([start, tokens, self._since(begin), self._since(end)])

    def _since(self, at: float) -> float:
        return round(at - self._zero, 6)

    def _maybe(self, at: float) -> float | None:
        return self._since(at) if at else None
