"""Executables that compute nothing: the real scheduler runs on them, for its own cost or on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from makeready.graphs.inspect.step_time import Row
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import Bucket

TOKEN = 1  # what every row samples


class InstantExecutable:
    """Every row's next token is 1, at once.

    Args:
        plan: whose limits, buckets, steps, slots and cache groups the engine sees.
        pages: of the cache, page 0 included.
    """

    asynchronous = True  # the engine's part is that of a device it need not wait for

    def __init__(self, plan: Plan, pages: int) -> None:
        self.plan, self.pages = plan, pages
        self.blocks: Mapping[str, int] = plan.kv.blocks(pages, plan.limits)
        self._results = {
            phase: {f.name: np.full(f.spec.at(step.largest), f.default, f.spec.dtype) for f in step.results}
            for phase, step in plan.steps.items()
        }
        for results in self._results.values():
            results["tokens"][:] = TOKEN

    def write_slot(self, slot: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> Any:
        """Nothing; results are there."""
        return _Instant(self._results[bucket.phase])

    def resume(self, late: Mapping[int, Mapping[str, Any]]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is held."""


class _Instant:
    def __init__(self, results: Mapping[str, np.ndarray]) -> None:
        self._results = results

    def wait(self) -> Mapping[str, np.ndarray]:
        """The same token for every row."""
        return self._results


class VirtualExecutable(InstantExecutable):
    """Steps take what they are predicted to, on a clock that nobody waits for.

    Steps run one after the other. Waiting for one sets the clock to its end.

    Args:
        seconds: of a step of a bucket with these live rows.

    Attributes:
        now: the clock, in seconds.
        steps: that were launched.
    """

    def __init__(self, plan: Plan, pages: int, seconds: Callable[[Bucket, list[Row]], float]) -> None:
        super().__init__(plan, pages)
        self.asynchronous = plan.target != "cpu"
        self.now, self.steps = 0.0, 0
        self._seconds = seconds
        self._free = 0.0  # when the last step that was launched ends
        self._cached = np.zeros(plan.limits.slots, np.int64)

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> Any:
        """A step begins when the one before it has ended; what it takes is known now."""
        live = step["query_len"] > 0
        slots, counts, starts = (step[name][live] for name in ("row_slot", "query_len", "row_start"))
        # A row that generates starts where the device says that it is.
        contexts = np.where(starts < 0, self._cached[slots], starts) + counts
        self._cached[slots] = contexts
        rows = list(map(Row._make, zip(counts.tolist(), contexts.tolist(), strict=True)))
        self._free = max(self._free, self.now) + self._seconds(bucket, rows)
        self.steps += 1
        return _Timed(self, self._free, self._results[bucket.phase])


class _Timed:
    def __init__(self, executable: VirtualExecutable, end: float, results: Mapping[str, np.ndarray]) -> None:
        self._executable, self._end, self._results = executable, end, results

    def wait(self) -> Mapping[str, np.ndarray]:
        """The same token for every row, at the step's end."""
        self._executable.now = max(self._executable.now, self._end)
        return self._results
