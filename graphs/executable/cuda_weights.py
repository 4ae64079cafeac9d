"""Parameters from a checkpoint to the GPU, by a plan's recipe, while the host does something else.

Rows that a mapped file holds in the very dtype that the plan wants go straight from the page cache: the
file's pages are pinned a window at a time, copied to their places and let go, by a few threads side by side
(41 GB/s on an H100, as against 8.5 from pageable memory). All else, conversions, dequantized blocks,
generated constants, or files that cannot be pinned, passes through pinned buffers, two for each thread, so
that one is filled while the other is copied.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.constants import GENERATORS
from makeready.graphs.executable.cuda_convert import convert, stored_dtype
from makeready.graphs.executable.cuda_driver import Device, Driver, DriverError, host_bytes
from makeready.graphs.plan import Plan, PlanError, Weight
from makeready.graphs.recipe import Piece
from makeready.kernels.spec import DTYPE_BYTES

Progress: TypeAlias = Callable[[int, int], None]

WINDOW = 256 * 2**20  # bytes of a file that are pinned at once
CHUNK = 8 * 2**20  # bytes of a pinned buffer
READ = 32 * 2**20  # bytes of a parameter that are read and converted at once
MOST_THREADS = 12  # 33 GB/s through pinned buffers on 16 cores, 8 threads were slower


@dataclass(frozen=True)
class _Span:
    """Bytes of a mapped file and where on the device they go."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class _Window:
    """Spans of one mapped file that lie within :data:`WINDOW` bytes of each other."""

    spans: list[_Span] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)  # by span


@dataclass(frozen=True)
class _Rows:
    """Rows to read, convert and copy: ``read`` gives bytes that go to ``target``."""

    read: Callable[[], np.ndarray]
    target: int
    weight: int


class Upload:
    """The loading of all parameters, begun when made.

    Args:
        base: address of the weights region.
        progress: told how many of how many parameters are on the device.
        threads: how many threads load; None takes the cores there are, up to 12.

    Raises:
        PlanError: a parameter's layout, or its conversion, is of another version.
    """

    def __init__(
        self,
        driver: Driver,
        device: Device,
        plan: Plan,
        checkpoint: Checkpoint,
        base: int,
        progress: Progress,
        threads: int | None = None,
    ) -> None:
        self._driver = driver
        self._device = device
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._pinnable = True
        windows: dict[tuple[int, int], _Window] = {}
        rows: list[_Rows] = []
        for index, weight in enumerate(plan.weights):
            for part in _parts(weight, index, checkpoint, base):
                if isinstance(part, _Rows):
                    rows.append(part)
                else:
                    file, span = part
                    _add(windows, file, span, index)
        # What takes the host's time goes first, so that it ends with the copies.
        self._tasks: deque[_Rows | _Window] = deque([*rows, *windows.values()])
        self._left = [0] * len(plan.weights)
        for row in rows:
            self._left[row.weight] += 1
        for window in windows.values():
            for index in window.weights:
                self._left[index] += 1
        count = min(threads or _cores(), MOST_THREADS, max(len(self._tasks), 1))
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="upload")
        self._workers = [self._pool.submit(self._work) for _ in range(count)]

    def wait(self) -> None:
        """Wait until every parameter is on the device; raises what went wrong."""
        self._pool.shutdown()
        for worker in self._workers:
            worker.result()

    def cancel(self) -> None:
        """Stop, and wait until no thread touches the device any more."""
        self._tasks.clear()
        self._pool.shutdown()

    def _work(self) -> None:
        try:
            self._driver.use(self._device)
            self._work_in(_Lane(self._driver))
        except BaseException:
            self._tasks.clear()  # nobody needs the rest
            raise

    def _work_in(self, lane: _Lane) -> None:
        try:
            while self._tasks:
                try:
                    task = self._tasks.popleft()
                except IndexError:  # another thread was faster
                    break
                if isinstance(task, _Rows):
                    lane.push(task.read(), task.target)
                    self._finish([task.weight])
                else:
                    self._copy_window(task, lane)
                    self._finish(task.weights)
        finally:
            lane.close()

    def _copy_window(self, window: _Window, lane: _Lane) -> None:
        pinned = self._pin(window) if self._pinnable else None
        if pinned is None:
            for span in window.spans:
                lane.push(host_bytes(span.source, span.nbytes), span.target)
            return
        try:
            for span in window.spans:
                self._driver.to_device(span.target, span.source, span.nbytes, lane.stream)
            self._driver.synchronize(lane.stream)
        finally:
            self._driver.unregister(pinned)

    def _pin(self, window: _Window) -> int | None:
        """Pin the pages of a window; None where the system does not pin mapped files."""
        page = mmap.PAGESIZE
        start = min(s.source for s in window.spans) // page * page
        end = -(-max(s.source + s.nbytes for s in window.spans) // page) * page
        try:
            self._driver.register(start, end - start)
        except DriverError:
            self._pinnable = False
            return None
        return start

    def _finish(self, weights: list[int]) -> None:
        with self._lock:
            for index in weights:
                self._left[index] -= 1
                self._done += self._left[index] == 0
            self._progress(self._done, len(self._left))


class _Lane:
    """One thread's stream and its two pinned buffers, which are allocated when first used."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.stream = driver.stream()
        self._buffers: list[tuple[np.ndarray, Any]] = []
        self._turn = 1

    def push(self, source: np.ndarray, target: int) -> None:
        """Copy the bytes of a contiguous array to the device; it may be dropped on return."""
        flat = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        for start in range(0, flat.nbytes, CHUNK):
            part = flat[start : start + CHUNK]
            buffer, event = self._next()
            np.copyto(buffer[: part.nbytes], part)
            self._driver.to_device(target + start, buffer.ctypes.data, part.nbytes, self.stream)
            self._driver.record(event, self.stream)

    def close(self) -> None:
        """Wait for the copies and free everything."""
        self._driver.synchronize(self.stream)
        for buffer, event in self._buffers:
            self._driver.free_host(buffer.ctypes.data)
            self._driver.destroy_event(event)
        self._driver.destroy_stream(self.stream)

    def _next(self) -> tuple[np.ndarray, Any]:
        self._turn ^= 1
        if len(self._buffers) < 2:
            address = self._driver.allocate_host(CHUNK)
            self._buffers.append((host_bytes(address, CHUNK), self._driver.event()))
            return self._buffers[-1]
        buffer, event = self._buffers[self._turn]
        self._driver.wait(event)
        return buffer, event


def _parts(
    weight: Weight, index: int, checkpoint: Checkpoint, base: int
) -> Iterator[_Rows | tuple[int, _Span]]:
    """What a parameter is put together from: spans of mapped files with the file's key, or rows to convert."""
    param, start = weight.param, base + weight.offset
    if param.layout != "rows":
        raise PlanError(
            f"parameter {param.name} has the layout {param.layout!r}, which this version cannot load; "
            "compile the plan again"
        )
    wanted = param.spec.dtype
    if param.generated is not None:
        made = param.generated
        yield _Rows(
            lambda: convert((array := GENERATORS[made.function](**made.arguments)), array.dtype.name, wanted),
            start,
            index,
        )
    row = int(np.prod(param.spec.at({})[1:], dtype=np.int64)) * DTYPE_BYTES[wanted]
    for piece in param.pieces:
        target = start + piece.at * row
        mapped = _mapped(checkpoint, piece, wanted)
        if mapped is not None:
            file, array = mapped
            yield file, _Span(array.ctypes.data, target, array.nbytes)
            continue
        step = max(1, READ // row)
        for first in range(piece.start, piece.stop, step):
            rows = slice(first, min(first + step, piece.stop))
            yield _Rows(_reader(checkpoint, piece, rows, wanted), target + (first - piece.start) * row, index)


def _reader(checkpoint: Checkpoint, piece: Piece, rows: slice, wanted: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = checkpoint.read(piece.source, rows)
        return convert(array, stored_dtype(array, checkpoint.tensors[piece.source].dtype), wanted)

    return read


def _mapped(checkpoint: Checkpoint, piece: Piece, wanted: str) -> tuple[int, np.ndarray] | None:
    """The rows of a piece as they lie in a mapped file, with the file's key; None where they do not."""
    if checkpoint.tensors[piece.source].dtype != wanted:
        return None
    # One row first: rows that are not a view of the file are copied when they are read.
    for stop in (piece.start + 1, piece.stop):
        array = checkpoint.read(piece.source, slice(piece.start, stop))
        file = _file_of(array)
        if file is None:
            return None
        if stop == piece.stop:
            return file, array
    return None


def _file_of(array: np.ndarray) -> int | None:
    """A key of the mapped file that a contiguous array looks into, None where it looks into none."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return id(base) if isinstance(base, mmap.mmap) and array.flags.c_contiguous else None


def _add(windows: dict[tuple[int, int], _Window], file: int, span: _Span, weight: int) -> None:
    """Put a span into the windows that it touches, cut at their bounds.

    A copy may not leave the pages that are pinned together, and no page may be pinned twice at a time; the
    bounds are multiples of a page.
    """
    start = span.source
    end = span.source + span.nbytes
    while start < end:
        stop = min(end, (start // WINDOW + 1) * WINDOW)
        window = windows.setdefault((file, start // WINDOW), _Window())
        window.spans.append(_Span(start, span.target + start - span.source, stop - start))
        window.weights.append(weight)
        start = stop


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
