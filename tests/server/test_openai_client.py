"""OpenAI's own client against a real server with a real model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from server_process import WAIT_SECONDS, ServerProcess

MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]
CALL = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
# A model of 135M goes on as it has seen it.
SHOTS = "".join(
    f"<|im_start|>user\nWeather in {city}?<|im_end|>\n<|im_start|>assistant\n{CALL.format(city)}<|im_end|>\n"
    for city in ("Paris", "Rome", "Oslo")
)
TEMPLATE = (
    f"{{{{ {SHOTS!r} }}}}{{% for m in messages %}}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}{% if thinks %}{{ '<think>\n' }}{% endif %}"
)
WEATHER: Any = [{"role": "user", "content": "Weather in London?"}]
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS)


def test_a_streamed_chat_is_the_plain_one(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "messages": MESSAGES, "temperature": 0, "logprobs": True}
    for most, top in ((1, 0), (10, 2)):
        asked |= {"max_tokens": most, "top_logprobs": top}
        plain = client.chat.completions.create(**asked)
        chunks = list(
            client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        (choice,) = plain.choices
        *said, usage = chunks
        assert usage.choices == []
        assert {chunk.id for chunk in chunks} == {usage.id}
        assert usage.id != plain.id
        assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (
            plain.usage.prompt_tokens,
            plain.usage.completion_tokens,
        )
        assert usage.usage.completion_tokens == most
        assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in said)
        deltas = [chunk.choices[0].delta for chunk in said]
        assert (deltas[0].role, deltas[0].content) == ("assistant", "")
        assert "".join(delta.content or "" for delta in deltas) == choice.message.content
        reasons = [chunk.choices[0].finish_reason for chunk in said]
        assert reasons == [None] * (len(said) - 1) + [choice.finish_reason] == [*reasons[:-1], "length"]
        entries = [
            entry
            for chunk in said
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
        assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content]
        assert [len(entry.top_logprobs) for entry in entries] == [top] * most


def test_completions_with_everything(client: openai.OpenAI) -> None:
    """Several prompts and samples, echo, log-probabilities of prompts: what is streamed joins to what is not."""
    asked: dict[str, Any] = {
        "model": "other",
        "prompt": ["The capital of France is", "One, two, three, f"],
        "max_tokens": 8,
        "n": 2,
        "seed": 3,
        "temperature": 0.7,
        "echo": True,
        "logprobs": 2,
        "stop": [" a", "five,"],
    }
    plain = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert [choice.index for choice in plain.choices] == [0, 1, 2, 3]
    assert plain.choices[0].text.startswith("The capital of France is")
    for choice in plain.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "text_offset"):
            joined = [item for each in mine if each.logprobs for item in getattr(each.logprobs, name)]
            assert joined == getattr(choice.logprobs, name), name
        assert choice.logprobs.token_logprobs[0] is None
        assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    ids = client.completions.create(model="smol", prompt=[504, 3575, 282], max_tokens=3, temperature=0)
    assert ids.usage.prompt_tokens == 3


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tool_calls_stream_as_they_are_written(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"model": "smol", "messages": WEATHER, "temperature": 0, "max_tokens": 40}
    asked |= {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    asked |= {"extra_body": {"chat_template": TEMPLATE}}
    plain = client.chat.completions.create(**asked)
    (call,) = plain.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "London"}
    assert (plain.choices[0].finish_reason, plain.choices[0].message.content) == ("tool_calls", None)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
    assert (deltas[0].id, deltas[0].type, deltas[0].function.name) == (call.id, "function", "get_weather")
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert len(deltas) > 3
    assert not any(chunk.delta.content for chunk in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


def test_reasoning_has_both_names(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "messages": WEATHER, "temperature": 0, "max_tokens": 5}
    asked |= {"extra_body": {"chat_template": TEMPLATE, "chat_template_kwargs": {"thinks": True}}}
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.content is None
    assert message.reasoning
    assert message.reasoning == message.reasoning_content
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == message.reasoning
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    made = client.chat.completions.create(
        model="smol", messages=MESSAGES, max_tokens=60, response_format=wanted, seed=1
    )
    assert made.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(made.choices[0].message.content), schema)
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="cannot be enforced") as refused:
        client.chat.completions.create(model="smol", messages=MESSAGES, response_format=bad, stream=True)
    assert refused.value.status_code == 400  # before anything was streamed


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="smol", messages=MESSAGES, max_tokens=10_000)
    assert "exceed the context of 512 tokens" in bad.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="smol", messages=MESSAGES, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(model="smol", prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match="files are not read"):
        client.chat.completions.create(
            model="smol", messages=MESSAGES, extra_body={"chat_template": "x.jinja"}
        )
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"


def test_models_and_tokens(client: openai.OpenAI, server: ServerProcess) -> None:
    assert [model.id for model in client.models.list()] == ["smol", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("third")
    text = "Hello  world 🦙 ñ"
    made = httpx.post(server.url + "/tokenize", json={"prompt": text}).json()
    assert made["count"] == len(made["tokens"])
    assert httpx.post(server.url + "/detokenize", json={"tokens": made["tokens"]}).json()["prompt"] == text
    chat = httpx.post(server.url + "/tokenize", json={"messages": MESSAGES}).json()
    used = client.chat.completions.create(model="smol", messages=MESSAGES, max_tokens=1).usage
    assert used.prompt_tokens == chat["count"]
    again = client.chat.completions.create(model="smol", messages=MESSAGES, max_tokens=1).usage
    assert 0 < again.prompt_tokens_details.cached_tokens < chat["count"]


def test_characters_of_several_tokens_come_whole(client: openai.OpenAI) -> None:
    """A flag is two characters of four bytes, which this vocabulary writes in several tokens."""
    bias = {"198": -100.0}
    asked: dict[str, Any] = {"model": "smol", "prompt": "🇩🇪🇫🇷🇩🇪🇫🇷🇩🇪🇫🇷🇩🇪", "max_tokens": 12, "temperature": 0}
    asked |= {"logprobs": 0, "logit_bias": bias}
    plain = client.completions.create(**asked).choices[0]
    assert any(token.startswith("bytes:") for token in plain.logprobs.tokens), plain.text
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == plain.text
    assert not any("\ufffd" in chunk.text for chunk in chunks[:-1])
    offsets = [place for chunk in chunks if chunk.logprobs for place in chunk.logprobs.text_offset]
    assert offsets == plain.logprobs.text_offset
