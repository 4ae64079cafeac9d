"""What ``/openapi.json`` says is what is served."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest
from in_process import served

from makeready.engine.protocol.openai import body as bodies
from makeready.engine.server.routes import all_routes
from makeready.engine.server.routes.openapi import document


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    with served() as server:
        return httpx.get(f"{server.url}/openapi.json").raise_for_status().json()


def test_every_route_is_there(described: dict[str, Any]) -> None:
    assert described == document(all_routes())
    named = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in all_routes()
        for method in route.methods
    }
    assert {(path, method) for path, each in described["paths"].items() for method in each} == named
    identities = [each["operationId"] for path in described["paths"].values() for each in path.values()]
    assert len(identities) == len(set(identities))


def test_bodies_are_schemas(described: dict[str, Any]) -> None:
    found = 0
    for path in described["paths"].values():
        for each in path.values():
            for media in each.get("requestBody", {}).get("content", {}).values():
                jsonschema.Draft202012Validator.check_schema(media["schema"])
                found += bool(media["schema"]["properties"])
    assert found > 15


@pytest.mark.parametrize(
    ("path", "body", "valid"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stop": ["a"], "top_k": 3}, True),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "temperature": "0"}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": 1.5}}, True),
        ("/v1/completions", {"prompt": [[1, 2]], "logprobs": 2, "response_format": {"type": "text"}}, True),
        ("/v1/completions", {"model": "x"}, False),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}]}, False),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}, True),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}, True),
        ("/v1/responses", {"input": "x", "max_output_tokens": 5}, True),
        ("/api/chat", {"messages": [], "options": {"num_predict": 3}, "think": "high", "format": {}}, True),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 3, "regex": "a"}}, True),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"max_new_tokens": "3"}}, False),
        ("/detokenize", {"tokens": [1, 2]}, True),
    ],
)  # fmt: skip
def test_what_bodies_say(described: dict[str, Any], path: str, body: dict[str, Any], valid: bool) -> None:
    schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert jsonschema.Draft202012Validator(schema).is_valid(body) is valid


def test_no_field_is_told_that_is_not_known() -> None:
    for url in (bodies.CHAT, bodies.COMPLETIONS):
        told = bodies.schema(url)["properties"]
        assert not bodies.unknown(url, dict.fromkeys(told.keys() - {"stream", "stream_options"}, 1))
        assert {*bodies.SAMPLING, "model"} <= told.keys()
        assert "suffix" not in told
