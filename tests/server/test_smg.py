"""A gateway that others wrote, ``smg`` in Rust, before our gRPC: what it makes of our tokens is what our HTTP says.

``MAKEREADY_SMG`` names a folder of its package (``pip install --target FOLDER smg``). It tokenizes, renders and reads
by itself, with the tokenizer that our server sends it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_process import WAIT_SECONDS, ServerProcess, until

FOLDER = os.environ.get("MAKEREADY_SMG")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="MAKEREADY_SMG names no folder of the package smg"),
]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
ASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stop": {"stop": ["with"]},
    "samples": {"n": 2},
    "schema": {"response_format": FORMAT, "max_tokens": 60},
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def gateway(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert FOLDER is not None
    log, port = tmp_path_factory.mktemp("smg") / "log", free_port()
    command = [sys.executable, str(Path(FOLDER) / "bin/smg"), "launch", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--worker-urls", f"grpc://{server.grpc}"]
    url = f"http://127.0.0.1:{port}"

    def knows() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return "smol" in httpx.get(url + "/v1/models").text and "registered tokenizer" in log.read_text()
        except httpx.HTTPError:
            return False

    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": FOLDER}
        ) as process,
    ):
        try:
            until(knows)
            yield url
        finally:
            process.terminate()


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS)


@pytest.mark.parametrize("name", ASKS)
def test_an_answer_through_the_gateway_is_ours(name: str, gateway: str, server: ServerProcess) -> None:
    body = {"model": "smol", "messages": [{"role": "user", "content": "Say hello."}]}
    body |= {"temperature": 0, "max_tokens": 20, **ASKS[name]}
    ours, theirs = (client(url).chat.completions.create(**body) for url in (server.url, gateway))
    said = [[(each.message.content, each.finish_reason) for each in made.choices] for made in (ours, theirs)]
    assert said[0] == said[1]
    assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens
    chunks = list(client(gateway).chat.completions.create(**body, stream=True))
    for index, (content, _) in enumerate(said[0]):
        deltas = [
            each.delta.content or "" for chunk in chunks for each in chunk.choices if each.index == index
        ]
        assert "".join(deltas) == content


def test_what_we_refuse_the_gateway_refuses_by_our_words(gateway: str) -> None:
    body: Any = {"model": "smol", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5000}
    with pytest.raises(openai.BadRequestError, match="exceed the context of 512"):
        client(gateway).chat.completions.create(**body)
