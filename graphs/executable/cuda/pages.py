"""Rows that a mapped file holds just as the plan wants them: straight from the page cache to the GPU.

A file is cut into windows. Each window is mapped into the process, pinned and copied by one thread while
others do the same with the next. Mapping comes first and apart from pinning, because the driver pins one
window at a time and would fault in 65,000 pages one by one meanwhile: that held the loading of an 8B model
at 17 GB/s and every other call to the driver up. Windows are let go when all is copied, or when too much is
pinned, since letting go waits for the device.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.executable.cuda.driver import Driver, DriverError, host_bytes
from makeready.graphs.plan.reads import Read, fetch

WINDOW = 256 * 2**20  # bytes of a file that are pinned at once
MAPPED = 16 * 2**20  # bytes that are mapped by one call, which holds up other changes of the address space
PINNED = 24 * 2**30  # bytes that all threads together keep pinned before they let go

_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which the mmap module does not know


@dataclass(frozen=True)
class Span:
    """Bytes of a mapped file and where they go, counted from the start of the weights region."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class Window:
    """Spans of one mapped file that lie within :data:`WINDOW` bytes of each other."""

    spans: list[Span] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)  # by span

    @property
    def pages(self) -> tuple[int, int]:
        """Address and bytes of the pages that hold the spans."""
        start = min(s.source for s in self.spans) // mmap.PAGESIZE * mmap.PAGESIZE
        end = max(s.source + s.nbytes for s in self.spans)
        return start, -(-(end - start) // mmap.PAGESIZE) * mmap.PAGESIZE


class Windows:
    """Windows of all files, being cut."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], Window] = {}

    def add(self, file: int, span: Span, weight: int) -> None:
        """Put a span into the windows that it touches, cut at their bounds.

        A copy may not leave the pages that are pinned together, and no page may be pinned twice at a time;
        the bounds are multiples of a page.
        """
        start, end = span.source, span.source + span.nbytes
        while start < end:
            stop = min(end, (start // WINDOW + 1) * WINDOW)
            window = self._made.setdefault((file, start // WINDOW), Window())
            window.spans.append(Span(start, span.target + start - span.source, stop - start))
            window.weights.append(weight)
            start = stop

    def all(self) -> list[Window]:
        """The windows in the order in which they were begun."""
        return list(self._made.values())


class Pins:
    """What one thread has pinned, and its copies from there.

    Args:
        stream: of the copies.
        most: bytes that stay pinned at most; one window may be more.
    """

    def __init__(self, driver: Driver, stream: Any, most: int) -> None:
        self._driver = driver
        self._stream = stream
        self._most = most
        self._pinned: list[int] = []
        self._nbytes = 0

    def copy(self, window: Window, base: int) -> bool:
        """Begin to copy a window to the weights region at ``base``; False where the system cannot pin it."""
        start, nbytes = window.pages
        if self._nbytes + nbytes > self._most:
            self.release()
        map_pages(start, nbytes)
        try:
            self._driver.register(start, nbytes)
        except DriverError:
            return False
        self._pinned.append(start)
        self._nbytes += nbytes
        for span in window.spans:
            self._driver.to_device(base + span.target, span.source, span.nbytes, self._stream)
        return True

    def release(self) -> None:
        """Wait for the copies and let everything go."""
        pinned, self._pinned, self._nbytes = self._pinned, [], 0
        with ExitStack() as undo:
            for start in pinned:
                undo.callback(self._driver.unregister, start)
            self._driver.synchronize(self._stream)


def map_pages(start: int, nbytes: int, stop: Callable[[], bool] = lambda: False) -> None:
    """Enter pages of a mapped file into the process's page table, reading the file where it is not cached.

    Args:
        start: a multiple of a page.
        stop: asked now and then whether to leave off.
    """
    for at in range(start, start + nbytes, MAPPED):
        if stop():
            return
        step = min(MAPPED, start + nbytes - at)
        if _madvise(ctypes.c_void_p(at), ctypes.c_size_t(step), _POPULATE_READ) != 0:
            host_bytes(at, step)[:: mmap.PAGESIZE].max()  # an older system: touch each page


def mapped(checkpoint: Checkpoint, read: Read, wanted: str) -> tuple[int, np.ndarray] | None:
    """What a read says as it lies in a mapped file, with the file's key; None where it does not."""
    if read.number or checkpoint.dtype_of(read.source) != wanted:
        return None
    # A little first: what is not a view of the file is copied when it is read.
    for part in (next(read.cut(1)), read):
        array = fetch(checkpoint, part)
        file = _file_of(array)
        if file is None:
            return None
        if part is read:
            return file, array
    return None


def _file_of(array: np.ndarray) -> int | None:
    """A key of the mapped file that a contiguous array looks into, None where it looks into none."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return id(base) if isinstance(base, mmap.mmap) and array.flags.c_contiguous else None


_madvise = ctypes.CDLL(None).madvise  # mmap.madvise would hold the interpreter's lock
