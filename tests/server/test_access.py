"""Keys, strict fields, origins, draining: what a server is told, on an engine that computes nothing."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import openai
import pytest
from in_process import served
from server_process import WAIT_SECONDS, until

from makeready.engine.server.settings import ServerSettings

BODY = {"prompt": [1, 2], "max_tokens": 2}


def code(method: str, url: str, key: str | None = None, **more: Any) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.request(method, url, headers=headers, **more).status_code


def test_keys() -> None:
    with served(ServerSettings(["fake"], api_keys=["one", "two"], admin_key="root")) as server:
        url = server.url
        for key, status in ((None, 401), ("on", 401), ("oné", 401), ("one", 200), ("two", 200)):
            header = {} if key is None else {"authorization": f"Bearer {key}".encode()}
            answer = httpx.post(url + "/v1/completions", json=BODY, headers=header)
            assert answer.status_code == status, key
        assert httpx.post(url + "/v1/completions", json=BODY, headers={"x-api-key": "one"}).status_code == 200
        assert code("GET", url + "/health") == code("GET", url + "/ready") == 200
        assert code("GET", url + "/metrics") == 401
        assert code("POST", url + "/flush_cache", "one") == 401
        assert code("POST", url + "/flush_cache", "root") == code("GET", url + "/metrics", "root") == 200
        client = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with served(ServerSettings(["fake"], admin_key="root")) as server:
        assert code("POST", server.url + "/v1/completions", json=BODY) == 200
        assert code("POST", server.url + "/flush_cache") == 401


def test_strict_fields_and_origins() -> None:
    settings = ServerSettings(["fake"], strict_fields=True, cors_origins=["https://good.example"])
    with served(settings) as server:
        answer = httpx.post(server.url + "/v1/completions", json=BODY | {"no_such": 1})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "no_such"
        asked = {"origin": "https://good.example", "access-control-request-method": "POST"}
        allowed = httpx.options(server.url + "/v1/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://good.example"
        page = httpx.post(server.url + "/v1/completions", json=BODY, headers={"origin": asked["origin"]})
        assert page.status_code == 200
        assert page.headers["access-control-allow-origin"] == asked["origin"]
        other = httpx.post(
            server.url + "/v1/completions", json=BODY, headers={"origin": "https://bad.example"}
        )
        assert other.status_code == 403


def test_an_engine_that_breaks_is_told_to_everybody() -> None:
    """A stream that has begun ends with the error; a plain request, which has not been answered, has its status."""
    with served() as server:
        server.executable.shut()
        answers: dict[bool, tuple[int, str]] = {}
        begun = threading.Event()

        def ask(stream: bool) -> None:
            body = {"prompt": [1], "max_tokens": 200, "stream": stream}
            url = server.url + "/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=WAIT_SECONDS) as answer:
                text = ""
                for part in answer.iter_text():
                    text += part
                    if stream and text.startswith("data: "):
                        begun.set()
                answers[stream] = answer.status_code, text

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        until(lambda: len(server.service.running) == 2)
        server.executable.allow(20)  # of the 200 that they need
        assert begun.wait(WAIT_SECONDS)
        until(lambda: len(server.engine.scheduler.running) == 2)
        server.executable.failure = RuntimeError("the device is gone")
        server.executable.open()
        for thread in threads:
            thread.join(WAIT_SECONDS)
        assert {stream: status for stream, (status, _) in answers.items()} == {True: 200, False: 503}
        assert "has ended" in json.loads(answers[False][1])["error"]["message"]
        assert '{"error":' in answers[True][1]
        assert answers[True][1].endswith("data: [DONE]\n\n")
        assert (
            code("GET", server.url + "/health")
            == code("POST", server.url + "/v1/completions", json=BODY)
            == 503
        )
        assert isinstance(server.failure, RuntimeError)
        server.failure = None
        server.engine.close()
