"""SIGINT and SIGTERM end a job with what it has to say, and cut off no change of its engine's."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ONCE_SECONDS = 1.0  # signals so close to each other are one: launchers pass on what the terminal sent as well


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, as it does before a cluster's queue or a container ends a job."""


class _Now:
    """Whether the main thread does what is not cut off, and a signal that waits for its end."""

    whole = False
    waits: type[KeyboardInterrupt] | None = None


@contextmanager
def whole() -> Iterator[None]:
    """A signal waits until what is done here is done; for what takes a step at most.

    Else it might be raised amid a change, after which sequences cannot be ended in order, or where Python drops what
    is raised. A second signal, of somebody who has waited, is raised at once.
    """
    try:
        _Now.whole = True
        yield
    finally:
        _Now.whole = False
        waited, _Now.waits = _Now.waits, None
    if waited is not None:
        raise waited


@contextmanager
def ending() -> Iterator[None]:
    """Let SIGTERM end a job as Ctrl-C does, with what it has to say; only the main thread may.

    A second signal would cut that short, so signals within a second of the first are ignored, even while
    the process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    before = {number: signal.getsignal(number) for number in kinds}
    last = -math.inf

    def end(number: int, frame: Any) -> None:
        nonlocal last
        if time.monotonic() - last <= ONCE_SECONDS:
            return
        last = time.monotonic()
        kind = kinds[signal.Signals(number)]
        if not _Now.whole or _Now.waits is not None:
            raise kind
        _Now.waits = kind

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # a shell's background job is not meant by Ctrl-C
            signal.signal(number, end)
    try:
        yield
    finally:
        if last < 0:
            for number, handler in before.items():
                signal.signal(number, handler)
