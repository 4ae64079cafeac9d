"""Processes that end when the one that leads them does, however it ends: also by kill -9.

A child that went on would keep its GPU memory, and nobody would read what it does. A child is bound by a pipe of
which it holds the one end and its parent the other: when the parent is gone, the system closes its end and
kills the child. That takes no thread and no help of the child's, which may be deep in a compiler or a driver call.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SET_SIGNAL = 10  # F_SETSIG of Linux, which the module fcntl has no name for: what O_ASYNC sends


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """``subprocess.Popen`` whose process is killed when this one ends, or drops the returned object."""
    read, write = os.pipe()
    try:
        process = subprocess.Popen(command, pass_fds=(read,), **options)
    except BaseException:
        os.close(write)
        raise
    else:
        weakref.finalize(process, os.close, write)
        # Of the open pipe, which the child shares: its end of it signals the child.
        fcntl.fcntl(read, fcntl.F_SETOWN, process.pid)
        fcntl.fcntl(read, _SET_SIGNAL, signal.SIGKILL)
        fcntl.fcntl(read, fcntl.F_SETFL, fcntl.fcntl(read, fcntl.F_GETFL) | os.O_ASYNC)
    finally:
        os.close(read)
    return process


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a process that :func:`start` starts to its end; its output is captured as text."""
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


@dataclass(frozen=True)
class Leader:
    """A process that others, started by somebody else, follow into its end.

    Attributes:
        place: the running system and the namespace that ``pid`` is a number of.
    """

    place: str
    pid: int


def this_process() -> Leader:
    """The present process as a leader."""
    return Leader(_place(), os.getpid())


def follow(leader: Leader) -> bool:
    """Have this process killed when ``leader`` ends; False where that is a process of another machine."""
    if leader.place != _place():
        return False
    try:
        watched = os.pidfd_open(leader.pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        raise
    threading.Thread(target=_end_with, args=(watched,), name="makeready leader", daemon=True).start()
    return True


def _end_with(watched: int) -> None:
    select.select([watched], [], [])  # readable once the process has ended
    os.kill(os.getpid(), signal.SIGKILL)


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
