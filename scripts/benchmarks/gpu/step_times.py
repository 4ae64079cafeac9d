"""Where the time between tokens goes on a GPU: in the graphs of steps, or between them.

Events with time stamps stand before and behind every graph that an executable launches. What is between two graphs
is copies to and from the device, and waiting for the host where it comes late.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from types import TracebackType
from typing import Any

from makeready.graphs.executable.cuda.driver import Driver


class StepTimes:
    """Time stamps of what ``driver`` launches, from entering to leaving."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._launch = driver.launch
        self._idle: list[tuple[Any, Any]] = []
        self._steps: list[tuple[Any, Any]] = []

    def __enter__(self) -> StepTimes:
        setattr(self._driver, "launch", self._stamped)  # noqa: B010  # a method is no attribute to type checkers
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        delattr(self._driver, "launch")
        for pair in (*self._idle, *self._steps):
            for event in pair:
                self._driver.destroy_event(event)

    def _stamped(self, graph: Any, stream: Any) -> None:
        begin, end = self._idle.pop() if self._idle else (self._driver.timer(), self._driver.timer())
        self._driver.record(begin, stream)
        self._launch(graph, stream)
        self._driver.record(end, stream)
        self._steps.append((begin, end))

    def take(self, last: int) -> dict[str, float] | None:
        """Medians over the ``last`` graphs since it was asked before, milliseconds; None of fewer than two.

        Returns:
            ``graph``: from its begin to its end; ``between``: from one's end to the next one's begin.
        """
        steps = self._steps[-last:]
        if steps:
            self._driver.wait(steps[-1][1])
        found = None
        if len(steps) > 1:
            seconds = self._driver.seconds
            found = {
                "graph": 1e3 * statistics.median(seconds(*pair) for pair in steps),
                "between": 1e3 * statistics.median(seconds(a[1], b[0]) for a, b in pairwise(steps)),
            }
        self._idle += self._steps
        self._steps = []
        return found


def words(found: dict[str, float] | None) -> str:
    """The figures behind a line of text; nothing where there are none."""
    if found is None:
        return ""
    return f"; graphs {found['graph']:.2f} ms, {found['between']:.2f} between them"
