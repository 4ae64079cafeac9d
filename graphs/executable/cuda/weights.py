"""Parameters from a checkpoint to the GPU, by a plan's recipe, in threads.

Rows that a mapped file holds in the very dtype that the plan wants go straight from the page cache
(graphs/executable/cuda/pages.py). All else, conversions, dequantized blocks, generated constants, or files
that cannot be pinned, passes through pinned buffers, two for each thread, so that one is filled while the
other is copied. What derivations read passes through them too (graphs/executable/cuda/conversions.py).
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.executable.cuda import pages as cuda_pages
from makeready.graphs.executable.cuda.conversions import Converter, LoadRun, load_runs
from makeready.graphs.executable.cuda.convert import convert, converted, runs
from makeready.graphs.executable.cuda.driver import Device, Driver, host_bytes
from makeready.graphs.executable.cuda.pages import Pins, Span, Window, Windows, map_pages, mapped
from makeready.graphs.plan.constants import GENERATORS
from makeready.graphs.plan.plan import Plan, PlanError, Weight
from makeready.graphs.plan.recipe import CHUNK_BYTES, LOADERS
from makeready.kernels.spec import DTYPE_BYTES

Progress: TypeAlias = Callable[[int, int], None]

CHUNK = CHUNK_BYTES  # of a pinned buffer
READ = 32 * 2**20  # bytes of a parameter that are read and converted at once
MOST_THREADS = LOADERS


@dataclass(frozen=True)
class _Rows:
    """Rows to read, convert and copy: ``read`` gives bytes that go to ``target`` of the weights region."""

    read: Callable[[], np.ndarray]
    target: int
    weight: int


class Upload:
    """The loading of all parameters, in threads that begin when it is made.

    Until :meth:`start` says where the parameters go, the threads map files, for which they need no device.

    Args:
        progress: told how many of how many parameters are on their way to the device.
        threads: how many threads load; None takes the cores there are, up to 8.

    Raises:
        PlanError: a parameter's layout, or its conversion, is of another version.
    """

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, progress: Progress, threads: int | None = None
    ) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._pinnable = True
        cut, rows = Windows(), list[_Rows]()
        for index, weight in enumerate(plan.weights):
            for part in _parts(weight, index, checkpoint):
                if isinstance(part, _Rows):
                    rows.append(part)
                else:
                    cut.add(*part, index)
        windows, converted = cut.all(), load_runs(plan, checkpoint)
        # What takes the host's time goes first, so that it ends with the copies.
        self._tasks: deque[_Rows | LoadRun | Window] = deque([*rows, *converted, *windows])
        self._unmapped = deque(windows)
        self._left = [0] * len(plan.weights)
        for task in self._tasks:
            for index in [task.weight] if isinstance(task, _Rows) else task.weights:
                self._left[index] += 1
        count = min(threads or _cores(), MOST_THREADS, max(len(self._tasks), 1))
        self._most_pinned = cuda_pages.PINNED // count
        self._place: tuple[Driver, Device, int, Converter | None] | None = None
        self._started, self._copied = threading.Event(), threading.Event()
        self._copying = count
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="upload")
        for _ in range(count):
            self._pool.submit(self._work)

    def start(self, driver: Driver, device: Device, base: int, converter: Converter | None = None) -> None:
        """Begin to copy to the weights region at ``base``; ``converter`` is there if the plan loads by kernels."""
        self._place = (driver, device, base, converter)
        self._started.set()

    def wait(self) -> None:
        """Wait until every parameter is on the device; raises what went wrong.

        The threads let go what they pinned behind that.
        """
        self._copied.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop, and wait until no thread touches the device any more."""
        self._tasks.clear()
        self._started.set()
        self._pool.shutdown()

    def _work(self) -> None:
        lane: _Lane | None = None
        try:
            self._map()
            self._started.wait()
            if self._place is None:  # closed before anything was copied
                return
            driver, device, base, converter = self._place
            driver.use(device)
            lane = _Lane(driver, base, self._most_pinned)
            self._copy(lane, converter)
            lane.drain()
        except BaseException as error:
            self._error = error
            self._tasks.clear()  # nobody needs the rest
        finally:
            self._arrive()
            if lane is not None:
                lane.close()

    def _map(self) -> None:
        """Map windows for as long as there is no device to copy to."""
        while self._unmapped and not self._started.is_set():
            try:
                window = self._unmapped.popleft()
            except IndexError:  # another thread was faster
                return
            map_pages(*window.pages, stop=self._started.is_set)

    def _copy(self, lane: _Lane, converter: Converter | None) -> None:
        while self._tasks:
            try:
                task = self._tasks.popleft()
            except IndexError:  # another thread was faster
                return
            if isinstance(task, _Rows):
                lane.push(task.read(), task.target)
                self._finish([task.weight])
                continue
            if isinstance(task, LoadRun):
                assert converter is not None, "the plan derives parameters"
                converter.run(task, lane)
                self._finish(task.weights)
                continue
            self._pinnable = self._pinnable and lane.pins.copy(task, lane.base)
            if not self._pinnable:
                for span in task.spans:
                    lane.push(host_bytes(span.source, span.nbytes), span.target)
            self._finish(task.weights)

    def _arrive(self) -> None:
        with self._lock:
            self._copying -= 1
            if self._copying == 0:
                self._copied.set()

    def _finish(self, weights: Sequence[int]) -> None:
        with self._lock:
            for index in weights:
                self._left[index] -= 1
                self._done += self._left[index] == 0
            self._progress(self._done, len(self._left))


class _Lane:
    """One thread's stream, what it pinned, and its two pinned buffers, which are allocated when first used.

    Args:
        base: address of the weights region, from which targets are counted.
        most_pinned: see :class:`Pins`.
    """

    def __init__(self, driver: Driver, base: int, most_pinned: int) -> None:
        self._driver = driver
        self.base = base
        self.stream = driver.stream()
        self.pins = Pins(driver, self.stream, most_pinned)
        self._buffers: list[tuple[np.ndarray, Any]] = []
        self._turn = 1

    def push(self, source: np.ndarray, target: int) -> None:
        """Copy the bytes of a contiguous array to the device; it may be dropped on return."""
        flat = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        for start in range(0, flat.nbytes, CHUNK):
            part = flat[start : start + CHUNK]
            buffer, event = self._next()
            np.copyto(buffer[: part.nbytes], part)
            self._driver.to_device(self.base + target + start, buffer.ctypes.data, part.nbytes, self.stream)
            self._driver.record(event, self.stream)

    def drain(self) -> None:
        """Wait for the copies."""
        self._driver.synchronize(self.stream)

    def close(self) -> None:
        """Wait for the copies, let go what is pinned and free everything, even where the driver refuses some."""
        with ExitStack() as undo:
            undo.callback(self._driver.destroy_stream, self.stream)
            for buffer, event in self._buffers:
                undo.callback(self._driver.destroy_event, event)
                undo.callback(self._driver.free_host, buffer.ctypes.data)
            undo.callback(self.pins.release)

    def _next(self) -> tuple[np.ndarray, Any]:
        self._turn ^= 1
        if len(self._buffers) < 2:
            address = self._driver.allocate_host(CHUNK)
            self._buffers.append((host_bytes(address, CHUNK), self._driver.event()))
            return self._buffers[-1]
        buffer, event = self._buffers[self._turn]
        self._driver.wait(event)
        return buffer, event


def _parts(weight: Weight, index: int, checkpoint: Checkpoint) -> Iterator[_Rows | tuple[int, Span]]:
    """What a parameter is put together from: spans of mapped files with the file's key, or rows to convert."""
    param, start = weight.param, weight.offset
    if param.layout != "rows":
        raise PlanError(
            f"parameter {param.name} has the layout {param.layout!r}, which this version cannot load; "
            "compile the plan again"
        )
    if param.derived is not None:  # its runs are tasks of their own
        return
    wanted, size = param.spec.dtype, DTYPE_BYTES[param.spec.dtype]
    if param.generated is not None:
        made = param.generated
        yield _Rows(
            lambda: convert((array := GENERATORS[made.function](**made.arguments)), array.dtype.name, wanted),
            start,
            index,
        )
    for operand in param.operands:
        for run in runs(checkpoint, operand, READ):
            target = start + run.offset
            if run.read is None:
                yield _Rows(run.make, target, index)
                continue
            view = mapped(checkpoint, run.read, wanted)
            if view is not None:
                file, array = view
                yield file, Span(array.ctypes.data, target, array.nbytes)
                continue
            for part in run.read.cut(READ // size):
                yield _Rows(partial(converted, checkpoint, part, wanted), target, index)
                target += size * math.prod(part.shape)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
