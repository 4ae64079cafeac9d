"""Files and batches by OpenAI's own client; a server that is killed goes on where it was."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from in_process import InProcess, served
from server_process import WAIT_SECONDS, ServerProcess, until
from test_ends import TINY

from makeready.engine.server.settings import ServerSettings

ROWS, TOKENS = 40, 200  # so that a batch takes long enough to be seen under way


def rows(count: int = ROWS, tokens: int = TOKENS) -> bytes:
    body = {"model": "tiny", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    lines = [
        {
            "custom_id": f"row-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {**body, "prompt": [i + 1, 2, 3]} if i else {**body, "prompt": []},
        }
        for i in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def client_of(server: ServerProcess | InProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS)


def test_a_batch_goes_on_when_its_server_is_started_again(tmp_path: Path) -> None:
    settings = ServerSettings(["tiny"], files_dir=tmp_path)
    data = rows(tokens=40)
    with served(settings) as server:
        server.executable.shut()
        client = client_of(server)
        file = client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
        assert client.files.content(file.id).read() == data
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        server.executable.allow(60)  # more than some rows need, and fewer than all
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 4)
        assert client.batches.retrieve(batch.id).status == "in_progress"
    with served(settings) as server:
        client = client_of(server)
        until(lambda: client.batches.retrieve(batch.id).status == "completed")
        done = client.batches.retrieve(batch.id)
        assert (done.request_counts.completed, done.request_counts.failed) == (ROWS - 1, 1)
        lines = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"row-{i}" for i in range(1, ROWS)]
    for number, line in enumerate(lines, 1):
        (choice,) = line["response"]["body"]["choices"]
        assert len(choice["token_ids"]) == 40, number


def test_files_are_taken_as_they_are(tmp_path: Path) -> None:
    rng = random.Random(2)
    with served(ServerSettings(["tiny"], files_dir=tmp_path)) as server:
        client = client_of(server)
        for data in (b"\r\n\r", b"\n--x\n", rng.randbytes(5000), b"", b"a\r\nb\nc\r"):
            file = client.files.create(file=("x", io.BytesIO(data)), purpose="batch")
            assert client.files.content(file.id).read() == data
            assert file.bytes == len(data)
        for path in ("../x", "file-1", "batch-" + "0" * 24):
            assert httpx.get(f"{server.url}/v1/files/{path}/content").status_code == 404
        empty = client.files.create(file=("x", io.BytesIO(b"")), purpose="batch")
        batch = client.batches.create(
            input_file_id=empty.id, endpoint="/v1/completions", completion_window="24h"
        )
        until(lambda: client.batches.retrieve(batch.id).status == "failed")
        assert "no rows" in client.batches.retrieve(batch.id).errors.data[0].message
    with served() as server:
        assert httpx.get(server.url + "/v1/files").status_code == 404


@pytest.mark.slow
def test_a_batch_goes_on_after_its_server_was_killed(tmp_path: Path) -> None:
    options = (*TINY, f"files_dir={tmp_path}", "served_model_name=tiny")
    with ServerProcess(*options) as server:
        client = client_of(server)
        file = client.files.create(file=("in.jsonl", io.BytesIO(rows())), purpose="batch")
        assert client.files.content(file.id).read() == rows()
        assert [each.id for each in client.files.list()] == [file.id]
        with pytest.raises(openai.BadRequestError, match="endpoint"):
            client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"a": "b"}
        )
        seen: list[Any] = []
        until(
            lambda: seen.append(client.batches.retrieve(batch.id)) or seen[-1].request_counts.completed >= 4
        )
        server.process.kill()
        assert seen[-1].status == "in_progress"
        server.process.wait(WAIT_SECONDS)
    with ServerProcess(*options) as server:
        client = client_of(server)
        until(lambda: client.batches.retrieve(batch.id).status == "completed")
        done = client.batches.retrieve(batch.id)
        assert (done.request_counts.total, done.request_counts.completed) == (ROWS, ROWS - 1)
        assert done.request_counts.failed == 1
        assert done.metadata == {"a": "b"}
        lines = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
        assert [line["custom_id"] for line in lines] == [f"row-{i}" for i in range(1, ROWS)]
        for line in lines[::13]:  # what a client gets that asks for the same
            number = int(line["custom_id"].removeprefix("row-"))
            asked: dict[str, Any] = {"prompt": [number + 1, 2, 3], "max_tokens": TOKENS, "temperature": 0}
            answer = httpx.post(server.url + "/v1/completions", json=asked | {"ignore_eos": True}).json()
            assert line["response"]["body"]["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]
        (error,) = client.files.content(done.error_file_id).text.splitlines()
        assert json.loads(error)["custom_id"] == "row-0"
        more = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        client.batches.cancel(more.id)
        until(lambda: client.batches.retrieve(more.id).status == "cancelled")
        client.files.delete(file.id)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        assert {each.id for each in client.batches.list()} == {batch.id, more.id}
