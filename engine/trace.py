"""Steps on a time line, as Perfetto (https://ui.perfetto.dev) and chrome://tracing open them.

The file is the JSON Array Format of Chrome's Trace Event Format: a list of events, whose closing bracket may
be missing. Events are written in whole lines, so what a killed process or a full disk leaves behind still
opens.

    host      plan, launch, wait and commit of each step
    device    from the launch, or the results before it, until the host had the results; for a step that the
              host picked up late, with ``waited_us`` near 0, the end on the device was earlier
    requests  a line each, from arrival to the last token; on it how long it waited in the queue
    counters  requests waiting and running; pages free, cached and held

The device was idle for its row's length less the sum of its slices, at least; at most, steps with
``waited_us`` near 0 were idle as well.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from makeready.engine.output import Output
from makeready.engine.sequence import ERROR
from makeready.engine.step_record import StepRecord

HOST, DEVICE = 1, 2  # rows of the time line
PROCESS = 1
LINES = 512  # events that are kept back at most: a write costs as much as making 20 of them
SECONDS = 1.0  # and at most for so long


class StepTrace:
    """Writes a trace file; use as a context manager, or close it.

    >>> with StepTrace("steps.json") as trace:
    ...     engine.observer = trace.step
    ...     trace.finish(reply.result())      # every reply, when it is final

    Args:
        path: of the file, which is replaced.

    Raises:
        OSError: here or later, where the disk is full; the file ends with the last event that it has room for.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._lines: list[str] = []
        self._written = 0.0
        self._start: float | None = None
        self._read = 0.0
        self._end = 0  # of the last whole line in the file
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
            "waited_us": round(1e6 * (record.results_read - record.wait_start), 3),
        }
        if record.drafted:
            facts |= {"drafted": record.drafted, "accepted": record.accepted}
        self._slice("plan", HOST, record.plan_start, record.launch_start)
        self._slice(f"launch {name}", HOST, record.launch_start, record.launch_end)
        self._slice("wait", HOST, record.wait_start, record.results_read)
        self._slice("commit", HOST, record.results_read, record.commit_end)
        self._slice(name, DEVICE, max(record.launch_end, self._read), record.results_read, facts)
        self._read = record.results_read
        at = self._time(record.commit_end) / 1000
        self._event("C", "requests", HOST, ts=at, args={"running": record.running, "waiting": record.waiting})
        pages = {"held": record.held, "cached": record.cached, "free": record.free}
        self._event("C", "pages", HOST, ts=at, args=pages)
        if len(self._lines) >= LINES or record.commit_end - self._written > SECONDS:
            self._flush()
            self._written = record.commit_end

    def finish(self, output: Output) -> None:
        """Add a request that ends now; one that was refused leaves no line."""
        meta = output.meta_info
        if output.finish_reason == ERROR:
            return
        end = time.perf_counter()
        arrived = end - meta["e2e_latency"]
        facts = {
            "reason": output.finish_reason,
            "prompt_tokens": output.prompt_tokens,
            "cached_tokens": meta["cached_tokens"],
            "completion_tokens": output.completion_tokens,
            "retractions": meta["num_retractions"],
        }
        if meta["time_to_first_token"] is not None:
            facts["first_token_us"] = round(1e6 * meta["time_to_first_token"], 3)
        for kind, name, at, more in (
            ("b", "request", arrived, {"args": facts}),
            ("b", "queue", arrived, {}),
            ("e", "queue", arrived + meta["queue_time"], {}),
            ("e", "request", end, {}),
        ):
            self._event(kind, name, HOST, cat="request", id=meta["id"], ts=self._time(at) / 1000, **more)

    def close(self) -> None:
        """Write what is left and end the list."""
        if self._file >= 0:
            self._flush()
            self._write(b"\n]\n")
            self._end_file()

    def _slice(
        self, name: str, row: int, begin: float, end: float, args: dict[str, Any] | None = None
    ) -> None:
        start, stop = self._time(begin), self._time(end)
        more = {"args": args} if args else {}
        # A nanosecond short: Perfetto drops a slice that overlaps the one before it, and one begins where the
        # other ends; its microseconds are floats, which it cuts off to nanoseconds.
        self._event("X", name, row, ts=start / 1000, dur=max(stop - start - 1, 0) / 1000, **more)

    def _event(self, kind: str, name: str, row: int, **more: Any) -> None:
        self._lines.append(json.dumps({"ph": kind, "name": name, "pid": PROCESS, "tid": row, **more}))

    def _time(self, seconds: float) -> int:
        """Nanoseconds since the first step began; what was before it counts as its beginning."""
        return max(0, round(1e9 * (seconds - (seconds if self._start is None else self._start))))

    def _flush(self) -> None:
        if self._lines:
            text = self._separator + ",\n".join(self._lines)
            self._separator = ",\n"
            self._lines.clear()
            self._write(text.encode())

    def _write(self, data: bytes) -> None:
        left = data
        try:
            while left:  # a full disk raises; a signal may cut a write short
                left = left[os.write(self._file, left) :]
        except OSError:
            os.ftruncate(self._file, self._end)
            self._end_file()
            raise
        self._end += len(data)

    def _end_file(self) -> None:
        os.close(self._file)
        self._file = -1
