"""Steps on a time line, as Perfetto (https://ui.perfetto.dev) and chrome://tracing open them.

The file is the JSON Array Format of Chrome's Trace Event Format: a list of events, whose closing bracket may
be missing. Events are written in whole lines, so what a killed process leaves behind still opens.

    host      plan, launch, wait and commit of each step
    device    from the launch, or the results before it, until the host had the results: a step that the
              host picks up late looks longer than it was
    counters  requests waiting and running; pages free, cached and held
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from makeready.engine.step_record import StepRecord

HOST, DEVICE = 1, 2  # rows of the time line
PROCESS = 1
LINES = 512  # events that are kept back at most: a write costs as much as making 20 of them
SECONDS = 1.0  # and at most for so long


class StepTrace:
    """Writes a trace file; use as a context manager, or close it.

    >>> with StepTrace("steps.json") as trace:
    ...     engine.observer = trace.step

    Args:
        path: of the file, which is replaced.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._lines: list[str] = []
        self._written = 0.0
        self._start: float | None = None
        self._read = 0.0
        self._separator = "[\n"
        for row, name in ((HOST, "host"), (DEVICE, "device")):
            self._event("M", "thread_name", row, args={"name": name})
            self._event("M", "thread_sort_index", row, args={"sort_index": row})
        self._event("M", "process_name", HOST, args={"name": "makeready"})
        self._flush()

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, record: StepRecord) -> None:
        """Add a step; an engine's observer."""
        if self._start is None:
            self._start = self._written = record.plan_start
        name = str(record.bucket)
        facts = {
            "rows": record.rows,
            "tokens": record.tokens,
            "padding": record.bucket.tokens - record.tokens,
            "cached": record.cached_tokens,
            "new": record.new_tokens,
            "retractions": record.retractions,
        }
        self._slice("plan", HOST, record.plan_start, record.launch_start)
        self._slice(f"launch {name}", HOST, record.launch_start, record.launch_end)
        self._slice("wait", HOST, record.wait_start, record.results_read)
        self._slice("commit", HOST, record.results_read, record.commit_end)
        self._slice(name, DEVICE, max(record.launch_end, self._read), record.results_read, facts)
        self._read = record.results_read
        at = self._time(record.commit_end)
        self._event("C", "requests", HOST, ts=at, args={"running": record.running, "waiting": record.waiting})
        pages = {"held": record.held, "cached": record.cached, "free": record.free}
        self._event("C", "pages", HOST, ts=at, args=pages)
        if len(self._lines) >= LINES or record.commit_end - self._written > SECONDS:
            self._flush()
            self._written = record.commit_end

    def close(self) -> None:
        """Write what is left and end the list."""
        if self._file >= 0:
            self._flush()
            os.write(self._file, b"\n]\n")
            os.close(self._file)
            self._file = -1

    def _slice(
        self, name: str, row: int, begin: float, end: float, args: dict[str, Any] | None = None
    ) -> None:
        start = self._time(begin)
        more = {"args": args} if args else {}
        self._event("X", name, row, ts=start, dur=round(self._time(end) - start, 3), **more)

    def _event(self, kind: str, name: str, row: int, **more: Any) -> None:
        self._lines.append(json.dumps({"ph": kind, "name": name, "pid": PROCESS, "tid": row, **more}))

    def _time(self, seconds: float) -> float:
        """Microseconds since the first step began."""
        return round(1e6 * (seconds - (self._start or 0.0)), 3)

    def _flush(self) -> None:
        text = self._separator + ",\n".join(self._lines) if self._lines else ""
        self._separator = ",\n"
        self._lines.clear()
        data = text.encode()
        while data:  # a full disk raises; a signal may cut a write short
            data = data[os.write(self._file, data) :]
