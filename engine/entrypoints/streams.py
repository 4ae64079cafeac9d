"""stdin, stdout and stderr that are closed, full, or read by nobody must not cost a job its rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


def open_streams() -> None:
    """Put /dev/null where a standard stream is closed.

    The next file that is opened would get its descriptor, and with it whatever a library prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest one that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


@contextmanager
def patient_stderr() -> Iterator[None]:
    """Meanwhile, a stderr that cannot be written to is given up instead of ending the job."""
    before = sys.stderr
    sys.stderr = cast(TextIO, _Patient(before))
    try:
        yield
    finally:
        sys.stderr = before


class _Patient:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """What is left in its buffer, and all that follows, goes nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
