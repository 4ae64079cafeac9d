"""Other graphs of a loaded plan than the ones that it runs, and what they take on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from makeready.graphs.executable.cuda.driver import Device, Driver
from makeready.graphs.executable.cuda.graph import GraphBuilder
from makeready.graphs.plan.spec import Bucket


class Workbench:
    """Builds graphs of a bucket from named choices, and times them.

    A graph runs on what the executable was last given to run in that bucket. As launches overlap and find in
    L2 what the ones before left there, a kernel is timed in its place: as the difference that it makes to a
    whole step.

    Args:
        addresses: of every value that launches in a bucket may name.
    """

    def __init__(
        self,
        driver: Driver,
        device: Device,
        stream: Any,
        builder: GraphBuilder,
        addresses: Callable[[Bucket], Mapping[str, int]],
    ) -> None:
        self.device = device
        self._driver = driver
        self._stream = stream
        self._builder = builder
        self._addresses = addresses
        self._graphs: list[Any] = []
        self._start, self._end = driver.timer(), driver.timer()
        self._open = True

    def graph(self, bucket: Bucket, choices: Mapping[str, str] | None = None) -> Any:
        """The graph of ``bucket`` with ``choices`` by ``tuned_key``, the planner's first elsewhere.

        Args:
            choices: None takes those that measured best before.
        """
        self._driver.use(self.device)
        made = self._builder.build(bucket, self._addresses(bucket), self._stream, choices=choices)
        self._graphs.append(made)
        return made

    def seconds(self, graph: Any, replays: int) -> float:
        """Of one of ``replays`` in a row; there was one more before them."""
        driver, stream = self._driver, self._stream
        driver.use(self.device)
        driver.launch(graph, stream)
        driver.record(self._start, stream)
        for _ in range(replays):
            driver.launch(graph, stream)
        driver.record(self._end, stream)
        driver.wait(self._end)
        return driver.seconds(self._start, self._end) / replays

    def clear(self) -> None:
        """Destroy the graphs."""
        self._driver.use(self.device)
        self._driver.synchronize(self._stream)
        while self._graphs:
            self._driver.destroy_executable(self._graphs.pop())

    def close(self) -> None:
        """Destroy everything; does nothing the second time."""
        if self._open:
            self._open = False
            self.clear()
            self._driver.destroy_event(self._start)
            self._driver.destroy_event(self._end)
