"""A day's traffic on a small model: nothing is dropped, and nothing grows.

``MAKEREADY_MOONCAKE`` names Mooncake's trace of conversations (JSON lines: timestamp in ms, input_length,
output_length, hash_ids, one for 512 tokens). It is played 20 times as fast, with 1/32 of its tokens, so that two
cores keep up; ``MAKEREADY_REQUESTS`` says how many of its requests, all where it is not set.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from server_process import ServerProcess, events, until

BLOCK, SCALE, SPEED = 512, 32, 20
CONTEXT = 4352  # 126,195 tokens and 2,000 of an answer, by 32, and some
SMALL = (
    *("checkpoint=dummy", "model=smollm2_135m", "model.num_hidden_layers=2", "model.hidden_size=64"),
    *("model.intermediate_size=64", "model.num_attention_heads=2", "model.num_key_value_heads=1"),
)
TINY = (
    *(*SMALL, "plan.max_rows=64", f"plan.context_len={CONTEXT}", "plan.max_tokens=512", "kv.memory_gib=0.03"),
    *("scheduler.max_queued_requests=20000", "model.max_position_embeddings=8192"),
)
GROWTH_MIB = 64  # of a process behind the first third; allocators keep some of what they had


def requests_of(path: Path, count: int | None) -> Iterator[tuple[float, dict[str, Any]]]:
    """Seconds at which each arrives, and its body; blocks of one id are the same tokens."""
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, islice(file, count)):
            length = max(1, row["input_length"] // SCALE)
            blocks = (
                [(block * 31 + place * 7) % 1000 + 1 for place in range(BLOCK // SCALE)]
                for block in row["hash_ids"]
            )
            prompt = [token for block in blocks for token in block][:length]
            params = {"max_new_tokens": max(1, row["output_length"] // SCALE), "ignore_eos": True}
            yield (
                row["timestamp"] / 1000 / SPEED,
                {"input_ids": prompt, "sampling_params": params, "stream": True},
            )


async def posted(url: str, path: str, body: dict[str, Any]) -> str:
    """The body of an answer, by a connection of its own: httpx takes time by the square of its open connections."""
    at = urlsplit(url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    try:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {at.netloc}\r\nconnection: close\r\ncontent-length: {len(data)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + data)
        status = await reader.readline()
        assert status.split()[1] == b"200", status + await reader.read()
        chunked = False
        while (line := await reader.readline()).strip():
            chunked |= line.lower().replace(b" ", b"") == b"transfer-encoding:chunked\r\n"
        assert chunked
        parts = list[bytes]()
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        return b"".join(parts).decode()
    finally:
        writer.close()


STREAMS, SECONDS = 256, 30.0
WIDE = (*SMALL, "model.vocab_size=4096", "plan.max_rows=256", "plan.context_len=1024", "plan.max_tokens=512")


def seconds_of(process: int) -> float:
    """Processor time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Asks for /health twenty times a second, in a process of its own, and prints how many ms each took.
HEALTH = """
import http.client, sys, time
host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
connection, end = http.client.HTTPConnection(host, port), time.monotonic() + seconds
while time.monotonic() < end:
    began = time.perf_counter()
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200
    print(1000 * (time.perf_counter() - began))
    time.sleep(0.05)
"""


async def health(url: str, seconds: float) -> list[float]:
    """Milliseconds that /health took, in order of size."""
    at = urlsplit(url)
    command = (sys.executable, "-c", HEALTH, str(at.hostname), str(at.port), str(seconds))
    asks = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await asks.communicate()
    assert asks.returncode == 0
    return sorted(map(float, said.split()))


@pytest.mark.soak
def test_health_while_256_stream(capsys: pytest.CaptureFixture[str]) -> None:
    """It is answered all the time; how fast is printed, beside the same with no streams, for machines differ."""
    with ServerProcess(*WIDE) as server:
        url, processes = server.url, (server.process.pid, server.host)
        tokens = 0

        async def stream() -> None:
            nonlocal tokens
            body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 64, "ignore_eos": True}}
            while True:
                await posted(url, "/generate", body | {"stream": True})
                tokens += 64

        async def main() -> None:
            for count in (0, STREAMS):
                streams = [asyncio.ensure_future(stream()) for _ in range(count)]
                began, before = time.monotonic(), [seconds_of(process) for process in processes]
                took = await health(url, SECONDS)
                wall = time.monotonic() - began
                shares = [
                    (seconds_of(process) - at) / wall for process, at in zip(processes, before, strict=True)
                ]
                assert all(not each.done() for each in streams)
                for each in streams:
                    each.cancel()
                await asyncio.gather(*streams, return_exceptions=True)
                p50, p99 = (took[int(len(took) * share)] for share in (0.5, 0.99))
                with capsys.disabled():
                    print(
                        f"{count} streams: /health p50 {p50:.1f}, p99 {p99:.1f}, most {took[-1]:.1f} ms of "
                        f"{len(took)}; {tokens / wall:.0f} tokens/s; processors of server and engine: "
                        f"{shares[0]:.2f} {shares[1]:.2f}; load {os.getloadavg()[0]:.1f}",
                        flush=True,
                    )
            assert tokens

        asyncio.run(main())


def held(process: int) -> tuple[float, int]:
    """MiB and open files of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(resident.split()[1]) / 1024, len(list(Path(f"/proc/{process}/fd").iterdir()))


@pytest.mark.soak
def test_the_trace_of_mooncake(capsys: pytest.CaptureFixture[str]) -> None:
    path = os.environ.get("MAKEREADY_MOONCAKE")
    if path is None:
        pytest.skip("MAKEREADY_MOONCAKE names no trace")
    count = os.environ.get("MAKEREADY_REQUESTS")
    rows = list(requests_of(Path(path), None if count is None else int(count)))
    done, began = 0, 0.0
    sizes: list[list[tuple[float, int]]] = []
    with ServerProcess(*TINY) as server:
        url, processes = server.url, (server.process.pid, server.host)

        async def one(arrival: float, body: dict[str, Any]) -> None:
            nonlocal done
            await asyncio.sleep(arrival)
            *said, end = events(await posted(url, "/generate", body))
            assert end == "[DONE]"
            last = json.loads(said[-1])
            assert last["meta_info"]["finish_reason"]["type"] == "length"
            assert last["meta_info"]["completion_tokens"] == body["sampling_params"]["max_new_tokens"]
            assert last["meta_info"]["prompt_tokens"] == len(body["input_ids"])
            done += 1
            if done % max(1, len(rows) // 12) == 0:
                sizes.append([held(process) for process in processes])
                with capsys.disabled():
                    print(f"{done} after {time.monotonic() - began:.0f} s:", sizes[-1], flush=True)

        async def main() -> None:
            nonlocal began
            began = time.monotonic()
            await asyncio.gather(*(one(*row) for row in rows))

        asyncio.run(main())
        assert done == len(rows)
        (load,) = httpx.get(f"{url}/v1/loads").json()["loads"]
        assert load["num_total_reqs"] == 0
        until(lambda: httpx.get(f"{url}/v1/loads").json()["loads"][0]["num_used_tokens"] == 0)
        early, late = sizes[len(sizes) // 3], [held(process) for process in processes]
        for (before, _), (after, _) in zip(early, late, strict=True):
            assert after - before < GROWTH_MIB, sizes
        assert all(files < 200 for _, files in late)
