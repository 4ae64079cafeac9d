"""A server in processes of its own, as a user starts it."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 300  # for what is sure to come, on a machine that does much else


class ServerProcess:
    """``scripts/serve.py`` with options, on a port that is free; use as a context manager."""

    def __init__(self, *options: str, **environment: str) -> None:
        command = [sys.executable, str(ROOT / "scripts/serve.py"), "port=0", *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.said: list[str] = []
        self._address = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        return self._found()[1]

    @property
    def grpc(self) -> str:
        """Host and port of its gRPC."""
        return self._found()[2]

    def _found(self) -> re.Match[str]:
        assert self._address.wait(WAIT_SECONDS), "".join(self.said)
        for line in self.said:
            if match := re.search(r"serving .* at (http[^\s;]+)(?: and grpc://(\S+))?;", line):
                return match
        raise AssertionError("".join(self.said))

    @property
    def host(self) -> int:
        """The id of the engine's process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in map(int, children):
            with suppress(FileNotFoundError, ProcessLookupError):  # others of its children come and go
                if b"makeready.engine.remote.host" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        raise AssertionError("there is no engine's process")

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return httpx.get(self.url + path).raise_for_status().json()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(10)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if "serving " in line:
                self._address.set()
        self._address.set()


def until(true: Callable[[], Any]) -> None:
    """Wait until a condition holds; a slow machine takes long, and what never comes is told in the end."""
    end = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.01)


async def until_async(true: Callable[[], Any]) -> None:
    """The same in an event loop, whose other tasks go on."""
    end = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < end, "it does not come to that"
        await asyncio.sleep(0.01)


def events(text: str) -> list[str]:
    """What the server-sent events of an answer hold."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]
