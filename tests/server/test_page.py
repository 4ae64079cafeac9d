"""The page's files, and the stream that it draws, on an engine that computes nothing."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process import InProcess, served
from server_process import WAIT_SECONDS, until

from makeready.engine.server.settings import ServerSettings

PAGE = Path(__file__).parents[2] / "engine/server/page"


def test_the_page_is_whole_and_its_policy_strict() -> None:
    with served() as server:
        answer = httpx.get(server.url + "/")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        policy = {
            part.split()[0]: part.split()[1:] for part in answer.headers["content-security-policy"].split(";")
        }
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == ["'none'"]
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert not re.search(
            r"<script(?![^>]*\ssrc=)|<style|\son\w+=|\sstyle=", answer.text
        )  # nothing inline
        parts = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', answer.text)
        assert {part.partition("?")[0] for part in parts} == {"page/page.js", "page/page.css"}
        for part in parts:
            found = httpx.get(f"{server.url}/{part}")
            assert found.status_code == 200
            assert found.headers["x-content-type-options"] == "nosniff"
            assert hashlib.sha256(found.content).hexdigest().startswith(part.partition("?")[2])
            if "css" in part:
                assert b"@import" not in found.content
                assert b"url(" not in found.content
        assert httpx.head(server.url + "/").status_code == 200
        for path in ("none.js", "..%2froutes%2fpage.py", "%2e%2e/app.py"):
            assert httpx.get(f"{server.url}/page/{path}").status_code == 404


def test_it_can_be_left_out_and_needs_no_key_itself() -> None:
    with served(ServerSettings(["fake"], page=False)) as server:
        for path in ("/", "/page/page.js", "/live"):
            assert httpx.get(server.url + path).status_code == 404
        assert httpx.head(server.url + "/").status_code == 200  # Ollama's
    with served(ServerSettings(["fake"], api_keys=["one"])) as server:
        assert (
            httpx.get(server.url + "/").status_code
            == httpx.get(server.url + "/page/page.js").status_code
            == 200
        )
        assert httpx.get(server.url + "/live").status_code == 401
        with httpx.stream("GET", server.url + "/live", headers={"authorization": "Bearer one"}) as answer:
            assert answer.status_code == 200


@contextmanager
def watched(server: InProcess) -> Iterator[Callable[[Callable[[list[Any]], bool]], list[Any]]]:
    """Reads the live stream; call what it gives to wait until its events fulfil a condition."""
    with httpx.stream("GET", server.url + "/live", timeout=WAIT_SECONDS) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        seen: list[Any] = []

        def read(enough: Callable[[list[Any]], bool]) -> list[Any]:
            end = time.monotonic() + WAIT_SECONDS
            while not enough(seen):
                assert time.monotonic() < end, seen[-1]
                seen.append(json.loads(next(lines)[6:]))
            return seen

        yield read


def lives(events: list[Any]) -> dict[str, Any]:
    """What is known of each sample by all events."""
    known: dict[str, Any] = {}
    for event in events[1:]:
        for row in event["requests"]:
            known[row["key"]] = known.get(row["key"], {}) | row
    return known


def test_what_is_told_is_what_the_engine_did() -> None:
    prompts = [[7] * 150, [7] * 150, [11, 5] * 33 + [3], [5]]
    with served() as server:
        server.executable.seconds = 0.002
        assert server.engine.on_chunk is None
        httpx.post(server.url + "/v1/completions", json={"prompt": [1, 2], "max_tokens": 3})  # unseen
        before = server.steps
        with watched(server) as read:
            read(lambda events: len(events) >= 2)
            until(lambda: server.engine.on_chunk is not None)

            def client(prompt: list[int]) -> None:
                body = {
                    "prompt": prompt,
                    "max_tokens": 30,
                    "ignore_eos": True,
                    "n": 2 if len(prompt) == 1 else 1,
                }
                httpx.post(server.url + "/v1/completions", json=body).raise_for_status()

            threads = [threading.Thread(target=client, args=(prompt,)) for prompt in prompts]
            for thread in threads:
                thread.start()
            events = read(lambda events: [row["state"] for row in lives(events).values()] == ["done"] * 5)
            for thread in threads:
                thread.join()
        constant, steps = events[0], [step for event in events[1:] for step in event["steps"]]
        assert constant["pages"] == 1199
        assert constant["max_rows"] == 16
        # Every step once, in order.
        assert [step["number"] for step in steps] == list(range(1, len(steps) + 1))
        assert len(steps) == server.steps - before
        assert sum(step["new_tokens"] for step in steps) == 5 * 30
        assert all(step["seconds"] > 0 and step["tokens"] <= step["bucket_tokens"] for step in steps)
        assert all(step["free"] + step["cached"] + step["held"] == 1199 for step in steps)
        rows = lives(events).values()
        assert sorted(row["prompt_tokens"] for row in rows) == [1, 1, 67, 150, 150]
        for row in rows:
            assert (row["output_tokens"], row["reason"], row["retractions"]) == (30, "length", 0)
            # Its chunks are its prompt, but for what was cached, in order and without gaps.
            at = row["cached_tokens"]
            assert row["chunks"][0][2] == row["admitted"]
            for start, tokens, begin, end in row["chunks"]:
                assert start == at
                assert begin < end
                at += tokens
            assert at == row["prompt_tokens"]
            assert row["arrived"] <= row["admitted"] < row["first_token"] < row["finished"]
        assert sum(len(row["chunks"]) for row in rows) >= 6  # 150 tokens are more than a step takes
        assert sum(step["prompt_tokens"] for step in steps) == sum(
            tokens for row in rows for _, tokens, _, _ in row["chunks"]
        )
        counts = events[-1]["latencies"]["first_token"][1]
        assert sum(counts) == 6
        until(lambda: server.engine.on_chunk is None)
        httpx.post(server.url + "/v1/completions", json={"prompt": [1] * 99, "max_tokens": 1})
        assert not server.service.live.watched


def test_a_request_whose_client_leaves_is_told() -> None:
    with served() as server:
        server.executable.shut()
        with watched(server) as read:
            read(lambda events: len(events) >= 2)
            server.executable.allow(10)  # of the 200 that it needs
            body = {"prompt": [9], "max_tokens": 200, "ignore_eos": True, "stream": True}
            with httpx.stream(
                "POST", server.url + "/v1/completions", json=body, headers={"x-request-id": "mine"}
            ) as answer:
                next(answer.iter_bytes())
            until(lambda: not server.service.running)
            server.executable.open()
            events = read(lambda events: any(row["state"] == "done" for row in lives(events).values()))
            (row,) = lives(events).values()
            assert (row["id"], row["reason"]) == ("mine", "abort")
            assert 0 < row["output_tokens"] < 200


def test_what_is_committed_is_what_the_sources_give(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (PAGE / "node_modules/esbuild").is_dir():
        pytest.skip("needs node, and what make page installs")
    subprocess.run([node, "build.mjs", str(tmp_path)], cwd=PAGE, check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in (PAGE / "built").iterdir()}, "run make page"
