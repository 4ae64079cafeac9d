"""SGLang's routes, and what holds for every route, against a real server."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from in_process import served
from prometheus_client.parser import text_string_to_metric_families
from server_process import WAIT_SECONDS, ServerProcess, events, until

GREEDY = {"temperature": 0, "max_new_tokens": 6}
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=WAIT_SECONDS)


def test_generate(http: httpx.Client) -> None:
    body: dict[str, Any] = {"text": PROMPT, "sampling_params": GREEDY, "rid": "mine"}
    one = http.post("/generate", json=body).json()
    assert one["text"].startswith(" Paris")
    assert one["meta_info"]["id"] == "mine"
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    assert len(one["output_ids"]) == one["meta_info"]["completion_tokens"] == 6
    plain = http.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 6}).json()
    assert plain["choices"][0]["text"] == one["text"]
    *said, done = events(http.post("/generate", json=body | {"stream": True}).text)
    assert done == "[DONE]"
    made = [json.loads(each) for each in said]
    texts = [each["text"] for each in made]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert (texts[-1], made[-1]["output_ids"]) == (one["text"], one["output_ids"])


def test_generate_several(http: httpx.Client) -> None:
    body: dict[str, Any] = {"text": [PROMPT, "x"], "sampling_params": [GREEDY | {"n": 2}, GREEDY]}
    body |= {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
    }
    made = http.post("/generate", json=body).json()
    assert len(made) == 3
    assert made[0]["text"] == made[1]["text"]
    meta = made[0]["meta_info"]
    assert meta["input_token_logprobs"][0][0] is None
    assert [entry[2] for entry in meta["input_token_logprobs"]] == [
        "The",
        " capital",
        " of",
        " France",
        " is",
    ]
    assert "".join(entry[2] for entry in meta["output_token_logprobs"]) == made[0]["text"]
    assert [len(top) for top in meta["output_top_logprobs"]] == [2] * 6
    said = [
        json.loads(each) for each in events(http.post("/generate", json=body | {"stream": True}).text)[:-1]
    ]
    for index, whole in enumerate(made):
        mine = [each for each in said if each["index"] == index]
        assert mine[-1]["output_ids"] == whole["output_ids"]


def test_what_is_unknown_is_named(http: httpx.Client) -> None:
    params = GREEDY | {"custom": 1}
    answer = http.post("/generate", json={"text": "x", "sampling_params": params, "no_such": 2, "a\n": 1})
    assert answer.headers["x-makeready-ignored-fields"] == "no_such, custom"
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "no_such": 1, "user": "me"}
    answer = http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.headers["x-makeready-ignored-fields"]) == (200, "no_such")


def test_requests_have_an_id(http: httpx.Client) -> None:
    assert http.get("/health", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    made = {http.get("/nothing").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    body = {"prompt": "x", "max_tokens": 1}
    answer = http.post("/v1/completions", json=body, headers={"x-request-id": "b-2"})
    assert answer.json()["id"] == "cmpl-b-2"


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"\xff",
            b"null",
            b"[" * 100_000,
            b'{"messages": "\\ud800"}',
            b'{"prompt": 1e999}',
        ),
        *(b'{"prompt": [99999999999999999999]}', b'{"prompt": [[]]}', b'{"prompt": {}}', b'{"prompt": ""}'),
        *(b'{"prompt": "a", "n": -1}', b'{"prompt": "a", "stream": 1}', b'{"prompt": "a", "stop": [[]]}'),
        *(b'{"prompt": "a", "logit_bias": {"x": 1}}', b'{"prompt": "a", "stream_options": {}}'),
        *(b'{"messages": [1]}', b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'),
        *(
            b'{"text": 1}',
            b'{"input_ids": []}',
            b'{"text": "a", "sampling_params": 7}',
            b'{"text": "a", "rid": []}',
        ),
        *(
            b'{"tokens": [-1]}',
            b'{"tokens": "a"}',
            b'{"model": [], "prompt": "a"}',
            b'{"text": ["a", 1]}',
        ),
    ],
)
def test_malformed_bodies_are_the_clients_own_fault(http: httpx.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/detokenize"):
        if path == "/tokenize" and b'"prompt": ""' in body:
            continue  # which has no tokens
        answer = http.post(path, content=body)
        if answer.status_code == 200:
            continue  # a body that is another route's
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["message"], path
    assert http.get("/health").status_code == 200


def test_bodies_have_a_limit(http: httpx.Client) -> None:
    def parts() -> Any:
        for _ in range(40):
            yield b" " * 2**20

    assert http.post("/generate", content=b" " * (33 << 20)).status_code == 413
    assert http.post("/generate", content=parts()).status_code == 413
    assert http.get("/v1/completions").status_code == 405


def test_pages_of_others_may_not_ask(http: httpx.Client, server: ServerProcess) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    assert (
        http.post("/v1/completions", json=body, headers={"origin": "https://evil.example"}).status_code == 403
    )
    assert http.post("/v1/completions", json=body, headers={"origin": server.url}).status_code == 200


def until_idle(http: httpx.Client) -> None:
    """Wait for requests whose clients left just now."""
    until(lambda: not http.get("/v1/loads").json()["loads"][0]["num_total_reqs"])


def test_metrics_are_read_by_the_formats_own_parser(http: httpx.Client) -> None:
    def generated() -> dict[str, float]:
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    until_idle(http)
    before = generated()
    http.post("/generate", json={"text": "x", "sampling_params": GREEDY})
    after = generated()
    for name in ("makeready_generated_tokens_total", "vllm:generation_tokens_total"):
        assert after[name] - before[name] == 6
    assert {f"vllm:{name}" for name in ("num_requests_running", "kv_cache_usage_perc")} <= after.keys()
    assert (
        after["vllm:time_to_first_token_seconds_count"]
        == before["vllm:time_to_first_token_seconds_count"] + 1
    )


def test_what_a_server_tells_of_itself(http: httpx.Client) -> None:
    assert http.get("/get_model_info").json()["served_model_name"] == "smol"
    info = http.get("/get_server_info").json()
    assert (info["context_len"], info["max_rows"]) == (512, 8)
    assert http.get("/health_generate").status_code == 200
    (load,) = http.get("/v1/loads").json()["loads"]
    assert load["max_total_num_tokens"] == info["kv_pages"] * 16
    assert http.get("/version").json()["version"]
    http.post(
        "/generate",
        json={"text": "Once upon a time there was a little girl who lived in a village near the "},
    )
    until_idle(http)
    assert http.post("/flush_cache").json()["flushed_pages"] > 0
    assert http.post("/flush_cache").json()["flushed_pages"] == 0


def test_abort_request_ends_it_where_it_stands() -> None:
    """On an engine that computes nothing, and stands still meanwhile."""
    with served() as server:
        server.executable.shut()
        server.executable.allow(10)  # of the 200 that it needs
        params = {"max_new_tokens": 200, "ignore_eos": True}
        body = {"input_ids": [1], "rid": "r", "stream": True, "sampling_params": params}
        said = []
        with httpx.stream("POST", server.url + "/generate", json=body) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    said.append(json.loads(line.removeprefix("data: ")))
                    if len(said) == 1:
                        assert httpx.post(server.url + "/abort_request", json={"rid": "r"}).status_code == 200
        assert said[-1]["meta_info"]["finish_reason"] == {"type": "abort"}
        assert 1 <= said[-1]["meta_info"]["completion_tokens"] <= 10
        assert httpx.post(server.url + "/abort_request", json={}).status_code == 400
