"""Chat templates rendered in a process of their own, under limits of processor time and memory.

A template is code from a model's folder or a user, and no limit inside of an interpreter holds: one expression such
as ``10 ** 10 ** 9`` or ``"a" * 2 ** 40`` is one step. So it runs where it can be ended. The process starts with
the first template (0.2 s) and stays; a rendering costs a message there and back (0.1 ms).

A message is eight bytes of length, then that many bytes: pickled arguments there, JSON back, since what comes
back was made by the template.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from makeready.graphs.children import start

SECONDS = 5.0  # of processor time a rendering may take: 10 MB of messages take half of one
MEMORY = 2**30  # bytes that it may take
PAUSE = 0.25  # between two looks at the clock of a rendering that has not answered
ENDED = "takes more than {limit}; shorten the messages, or pass another template"


class LimitError(Exception):
    """The template took too much time or memory."""


class BrokenTemplateError(Exception):
    """What a template raised.

    Attributes:
        kind: name of the exception.
        line: of the template, where its syntax is broken.
    """

    def __init__(self, kind: str, message: str, line: int | None) -> None:
        super().__init__(message)
        self.kind, self.line = kind, line


class Sandbox:
    """The process, started when it is first needed and again after it was ended; any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def render(self, template: str, variables: Mapping[str, Any] | None, seconds: float = SECONDS) -> str:
        """The text of a template; without variables it is compiled only.

        Raises:
            LimitError: it took too much.
            BrokenTemplateError: it cannot be compiled, or raised something.
            TypeError: variables that cannot be sent, such as functions.
        """
        try:
            sent = pickle.dumps((template, variables))
        except Exception as error:  # whatever an object of the user's raises
            raise TypeError(f"variables of a chat template must be plain values ({error})") from None
        with self._lock:
            try:
                answer = self._ask(sent, seconds)
            except BaseException:  # a Ctrl-C meanwhile, too: its answer must not be taken for the next one's
                self.close()
                raise
        made = json.loads(answer)
        if "text" in made:
            return made["text"].encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        if made["kind"] == "MemoryError":
            raise LimitError(ENDED.format(limit=f"{MEMORY / 2**30:.0f} GiB of memory"))
        raise BrokenTemplateError(made["kind"], made["message"], made["line"])

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(Exception):
                process.communicate()

    def _forget(self) -> None:
        """A copy of this process has a sandbox of its own, or answers would be mixed."""
        self._lock, self._process = threading.Lock(), None

    def _ask(self, sent: bytes, seconds: float) -> bytes:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = _start()
        assert process.stdin is not None
        assert process.stdout is not None
        limit = _processor_seconds(process.pid) + seconds
        try:
            process.stdin.write(len(sent).to_bytes(8, "little") + sent)
            process.stdin.flush()
            while not select.select([process.stdout], [], [], PAUSE)[0]:
                if _processor_seconds(process.pid) > limit:
                    raise LimitError(ENDED.format(limit=f"{seconds:g} s"))
            return _message(process.stdout)
        except (BrokenPipeError, EOFError):  # the system ended it, which it does for memory
            raise LimitError(ENDED.format(limit="the memory that there is")) from None


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    # It ends with this process. PR_SET_PDEATHSIG would end it with the thread that happened to start it.
    process = start(
        [sys.executable, "-m", "makeready.engine.text.sandbox"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C is for the job
    )
    assert process.stdout is not None
    try:
        _message(process.stdout)  # its imports are no part of a rendering
    except EOFError:
        raise OSError("its process ended at once") from None
    return process


def _processor_seconds(pid: int) -> float:
    """Processor time that a process took, start included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return time.monotonic()


def _message(stream: IO[bytes]) -> bytes:
    length = _exactly(stream, 8)
    return _exactly(stream, int.from_bytes(length, "little"))


def _exactly(stream: IO[bytes], count: int) -> bytes:
    made = stream.read(count)
    if len(made) < count:
        raise EOFError
    return made


def answer(render: Callable[[str, Mapping[str, Any] | None], str], sent: bytes) -> bytes:
    """What the process answers to a message."""
    try:
        template, variables = pickle.loads(sent)
        made: dict[str, Any] = {"text": render(template, variables)}
    except BaseException as error:
        line = getattr(error, "lineno", None)
        message = getattr(error, "message", None) or str(error)
        made = {"kind": type(error).__name__, "message": str(message)[:2000], "line": line}
    try:
        return json.dumps(made).encode()
    except MemoryError:
        return b'{"kind": "MemoryError", "message": "", "line": null}'


def _serve() -> None:
    from makeready.engine.text.chat import render_forms

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints
    made = b"ready"
    while True:
        sink.write(len(made).to_bytes(8, "little") + made)
        sink.flush()
        try:
            sent = _message(source)
        except EOFError:
            return
        made = answer(render_forms, sent)


SANDBOX = Sandbox()

if __name__ == "__main__":
    _serve()
