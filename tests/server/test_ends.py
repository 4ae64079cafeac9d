"""How a server's two processes end: drained, or killed. Each test has a server of its own; all start at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import WAIT_SECONDS, ServerProcess, events, until

TINY = (
    *("checkpoint=dummy", "model=smollm2_135m", "model.num_hidden_layers=2", "model.hidden_size=64"),
    *("model.intermediate_size=64", "model.num_attention_heads=2", "model.num_key_value_heads=1"),
    *("plan.max_rows=8", "plan.context_len=2048", "plan.max_tokens=64"),
)
LONG = {"prompt": [1, 2, 3], "max_tokens": 2000, "ignore_eos": True, "stream": True}


class Streams:
    """Clients that read streams to their ends, and have begun to once this is made."""

    def __init__(self, url: str, count: int) -> None:
        self.texts: list[str] = []
        self.broken: list[Exception] = []
        self._begun = threading.Semaphore(0)
        self._all = threading.Barrier(count)
        self._threads = [threading.Thread(target=self._read, args=(url,)) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in range(count):
            assert self._begun.acquire(timeout=WAIT_SECONDS)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(WAIT_SECONDS)

    def _read(self, url: str) -> None:
        text = ""
        try:
            # To make a client takes long; none ends before the last begins.
            with httpx.Client(timeout=WAIT_SECONDS) as client:
                self._all.wait(WAIT_SECONDS)
                with client.stream("POST", url + "/v1/completions", json=LONG) as answer:
                    for chunk in answer.iter_text():
                        if not text:
                            self._begun.release()
                        text += chunk
        except httpx.HTTPError as error:
            self.broken.append(error)
        self.texts.append(text)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ServerProcess]]:
    made = [ServerProcess(*TINY, "drain_seconds=900", "health_seconds=900") for _ in range(3)]
    yield made
    for server in made:
        server.process.kill()
        server.process.wait(WAIT_SECONDS)


def gone(process: int) -> bool:
    """Whether a process has ended, perhaps without anybody who asks about it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
def test_sigterm_under_load_breaks_no_stream(servers: list[ServerProcess]) -> None:
    server = servers[0]
    url, host = server.url, server.host
    streams = Streams(url, 8)
    os.kill(host, signal.SIGSTOP)  # so that none ends before all is seen
    server.process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(url + "/ready").status_code == 503)
    assert httpx.get(url + "/health").status_code == 200
    late = httpx.post(url + "/v1/completions", json=LONG)
    assert late.status_code == 503
    assert late.headers["retry-after"]
    os.kill(host, signal.SIGCONT)
    streams.join()
    assert server.process.wait(WAIT_SECONDS) == 0, "".join(server.said)
    assert not streams.broken
    for text in streams.texts:
        *said, done = events(text)
        assert done == "[DONE]"
        assert '"finish_reason":"length"' in said[-1]
    until(lambda: gone(host))


def test_a_killed_engine_ends_the_server(servers: list[ServerProcess]) -> None:
    server = servers[1]
    streams = Streams(server.url, 4)
    os.kill(server.host, signal.SIGKILL)
    code = server.process.wait(WAIT_SECONDS)
    streams.join()
    assert code == 1
    until(lambda: "the engine's process has ended" in "".join(server.said))  # it is read by a thread
    assert not streams.broken  # they were told
    assert all('{"error":' in text and text.endswith("data: [DONE]\n\n") for text in streams.texts)


def test_a_killed_server_ends_the_engine(servers: list[ServerProcess]) -> None:
    server = servers[2]
    host = server.host if server.url else 0
    streams = Streams(server.url, 4)
    server.process.kill()
    until(lambda: gone(host))
    streams.join()
    assert len(streams.broken) == 4
