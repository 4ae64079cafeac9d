"""Clients that go away, come in crowds, or read slowly; on an engine that computes nothing."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fake_executable import alone
from in_process import InProcess, served
from server_process import WAIT_SECONDS, events, until, until_async

LONG = {"max_new_tokens": 200, "ignore_eos": True}


def generate(server: InProcess, prompt: list[int], **more: Any) -> Any:
    body = {"input_ids": prompt, "sampling_params": {**LONG, "sampling_seed": 7, **more}}
    return httpx.post(server.url + "/generate", json=body).json()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("samples", "ahead"), [(1, 0), (4, 0), (2, 20)], ids=["one", "n", "queued"])
def test_who_leaves_gives_pages_back_within_two_steps(stream: bool, samples: int, ahead: int) -> None:
    with served() as server:
        server.executable.shut()
        url, many = httpx.URL(server.url), samples + ahead
        body = json.dumps(
            {
                "input_ids": [[1, 2, place + 3] for place in range(many)],
                "sampling_params": LONG,
                "stream": stream,
            }
        ).encode()
        with socket.create_connection((url.host, url.port)) as client:
            head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            until(lambda: len(server.service.running) == many)
            server.executable.allow(6)  # of the 200 that they need
            until(lambda: server.steps == 6)
            assert len(server.engine.scheduler.running) == min(16, many)
        until(lambda: not server.service.running)
        server.settle()
        server.executable.open()
        until(lambda: not server.engine.busy)
        # One stands at the gate as the client goes, and one may be planned before that is heard of.
        assert server.steps - 6 <= 2
        assert server.engine.pool.held == 0


def test_crowds_of_which_some_leave() -> None:
    crowd(64, twice=True)


@pytest.mark.slow
def test_large_crowds_of_which_some_leave() -> None:
    crowd(1000, twice=False)


def crowd(clients: int, twice: bool) -> None:
    """Who stays gets what it would get alone; who leaves, at a random moment, leaves nothing behind."""
    with served(max_queued_requests=2000) as server:
        rng = random.Random(5)

        async def one(http: httpx.AsyncClient, place: int) -> None:
            await asyncio.sleep(rng.random() * 0.5)
            prompt = [rng.randrange(50) for _ in range(rng.randrange(1, 30))]
            count, leaves = rng.randrange(1, 60), rng.random() < 0.5
            params = {"max_new_tokens": count, "sampling_seed": place, "ignore_eos": True}
            body = {"input_ids": prompt, "sampling_params": params, "stream": rng.random() < 0.7}
            if not leaves:
                answer = await http.post("/generate", json=body)
                text = events(answer.text)[-2] if body["stream"] else answer.text
                assert json.loads(text)["output_ids"] == alone(prompt, place, count, frozenset())
                return
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(http.post("/generate", json=body), rng.random() * 0.3)

        async def main() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS, limits=limits) as http:
                await asyncio.gather(*(one(http, place) for place in range(clients)))

        for _ in range(1 + twice):
            asyncio.run(main())
            until(lambda: not (server.engine.busy or server.service.running))
            assert server.engine.pool.held == 0
        until(lambda: not server.service.client._calls)


def test_a_slow_reader_stalls_nobody_and_gets_all() -> None:
    """It reads nothing while 200 tokens are generated for it; what it missed then comes in few events."""
    with served() as server:
        url = httpx.URL(server.url)
        body = {"input_ids": [5], "sampling_params": LONG | {"sampling_seed": 1}, "stream": True}
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((url.host, url.port))
        with slow:
            data = json.dumps(body).encode()
            head = f"POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
            slow.sendall(head.encode() + data)
            until(lambda: server.steps > 0)
            assert generate(server, [1, 2])["output_ids"] == alone([1, 2], 7, 200, frozenset())
            until(lambda: not server.engine.busy)  # the slow one has been generated, too
            answer = b"".join(iter(lambda: slow.recv(4096), b""))
        last = json.loads(answer[answer.rindex(b'data: {"text"') :].splitlines()[0].removeprefix(b"data: "))
        assert last["output_ids"] == alone([5], 1, 200, frozenset())


def test_where_there_is_no_room_a_client_is_told_when() -> None:
    with served(max_queued_requests=2, max_running_requests=2) as server:
        server.executable.seconds = 0.02
        server.executable.shut()

        async def main() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS) as http:
                asked = {"input_ids": [1], "sampling_params": LONG | {"max_new_tokens": 150}}
                first = [asyncio.ensure_future(http.post("/generate", json=asked)) for _ in range(2)]
                await until_async(lambda: len(server.service.running) == 2)
                server.executable.allow(8)
                await until_async(lambda: server.steps == 8)
                assert len(server.engine.scheduler.running) == 2
                more = [asyncio.ensure_future(http.post("/generate", json=asked)) for _ in range(10)]
                await until_async(lambda: len(server.service.running) == 12)
                server.executable.open()
                return await asyncio.gather(*first, *more)

        answers = asyncio.run(main())
    codes = [answer.status_code for answer in answers]
    assert (codes.count(200), codes.count(429)) == (4, 8)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(1 <= int(answer.headers["retry-after"]) <= 600 for answer in refused)
    # Two end after about 3 s, and each lets one in: the last of many is told to wait longer than the first.
    assert len({answer.headers["retry-after"] for answer in refused}) > 1
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


def test_health_is_answered_while_many_stream() -> None:
    with served() as server:
        server.executable.seconds = 0.002
        server.executable.shut()

        async def main() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_SECONDS, limits=limits) as http:
                asked = {"input_ids": [1], "sampling_params": LONG | {"max_new_tokens": 50}, "stream": True}
                streams = [asyncio.ensure_future(http.post("/generate", json=asked)) for _ in range(64)]
                await until_async(lambda: len(server.service.running) == 64)
                for _ in range(10):  # while tokens come, and while none do
                    server.executable.allow(5)
                    assert (await http.get("/health")).status_code == 200
                assert not any(stream.done() and stream.exception() for stream in streams)
                assert not all(stream.done() for stream in streams)
                server.executable.open()
                answers = await asyncio.gather(*streams)
                assert {answer.status_code for answer in answers} == {200}

        asyncio.run(main())
