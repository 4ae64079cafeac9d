"""Gauges follow what happens between steps, too: a client that leaves is no step."""

from __future__ import annotations

import re

import httpx
from in_process import served
from server_process import until


def test_gauges_fall_when_the_last_client_leaves() -> None:
    with served() as server:
        server.executable.shut()

        def figures() -> tuple[float, float]:
            text = httpx.get(server.url + "/metrics").text
            names = ("makeready_running_requests", 'makeready_kv_pages{state="held"}')
            found = [re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE) for name in names]
            running, held = (float(match[1]) for match in found if match)
            return running, held

        body = {"prompt": [1] * 20, "max_tokens": 200, "ignore_eos": True, "stream": True}
        server.executable.allow(10)  # of the 200 that it needs
        with httpx.stream("POST", server.url + "/v1/completions", json=body) as answer:
            next(answer.iter_bytes())
            until(lambda: figures()[0] == 1 and figures()[1] >= 5)
        until(lambda: not server.service.running)
        server.executable.open()
        until(lambda: figures() == (0, 0))
        assert httpx.get(server.url + "/v1/loads").json()["loads"][0]["num_used_tokens"] == 0
