"""Anthropic's messages, by their own client against a real server with a real model."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import httpx
import jiter
import jsonschema
import openai
import pytest
from in_process import served
from server_process import WAIT_SECONDS, ServerProcess
from test_openai_client import TEMPLATE

from makeready.engine.protocol.anthropic.partial import beginning_of
from makeready.engine.server.settings import ServerSettings

THINKS = TEMPLATE.replace("if thinks", "if enable_thinking")
USER: Any = [{"role": "user", "content": "Weather in London?"}]
TOOL: Any = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ANY: Any = {"type": "any", "disable_parallel_tool_use": True}
NAMED: Any = {"type": "tool", "name": "get_weather"}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=WAIT_SECONDS)


def total(usage: Any) -> int:
    """Tokens of a prompt, as the API's reference adds them."""
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


def asking(beyond: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of the client, and ``beyond`` them fields of the body, of which temperature is one of old."""
    asked: dict[str, Any] = {"model": "smol", "max_tokens": 5, "messages": USER}
    return asked | {"extra_body": {"temperature": 0, **(beyond or {})}} | more


def calling(**more: Any) -> dict[str, Any]:
    """The same with a template that the model calls tools and thinks with."""
    return asking({"chat_template": THINKS}, **more)


@pytest.mark.parametrize(
    ("asked", "kinds", "reason"),
    [
        (asking(messages=[{"role": "user", "content": "Name a colour."}]), ["text"], "max_tokens"),
        (calling(tools=[TOOL], tool_choice=ANY, max_tokens=40), ["tool_use"], "tool_use"),
        (calling(thinking={"type": "enabled", "budget_tokens": 1024}), ["thinking"], "max_tokens"),
        (
            calling(thinking={"type": "disabled"}, stop_sequences=["name"], max_tokens=12),
            ["text"],
            "stop_sequence",
        ),
    ],
    ids=["text", "a call", "thinking", "no thinking, and a stop"],
)
def test_a_stream_is_the_plain_message(
    client: anthropic.Anthropic, asked: Any, kinds: Any, reason: str
) -> None:
    """The client puts the events together by itself; their order is the one that is published."""
    plain = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        events = [event for event in stream if event.type.startswith(("message_", "content_block_"))]
        streamed = stream.get_final_message()
    assert [block.type for block in plain.content] == kinds
    assert plain.stop_reason == reason
    assert plain.stop_sequence == ("name" if reason == "stop_sequence" else None)
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in plain.content]
    assert (streamed.stop_reason, streamed.stop_sequence) == (plain.stop_reason, plain.stop_sequence)
    assert streamed.usage.output_tokens == plain.usage.output_tokens > 0
    assert total(streamed.usage) == total(plain.usage) == total(events[0].message.usage)
    assert streamed.id != plain.id

    order = [event.type for event in events]
    assert (order[0], order[-2:]) == ("message_start", ["message_delta", "message_stop"])
    (block,) = plain.content
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert order[1:-2] == [
        "content_block_start",
        *["content_block_delta"] * len(deltas),
        "content_block_stop",
    ]
    assert len(deltas) > 2
    if block.type == "tool_use":
        arguments = "".join(delta.partial_json for delta in deltas)
        assert json.loads(arguments) == block.input
        assert block.input["city"]
    elif block.type == "thinking":
        *thoughts, signature = deltas
        assert "".join(delta.thinking for delta in thoughts) == block.thinking
        assert signature.signature == block.signature
        assert block.signature
    else:
        assert "".join(delta.text for delta in deltas) == block.text


def test_published_events_have_their_names(server: ServerProcess) -> None:
    """Beneath the client, which skips pings."""
    body = {"model": "smol", "messages": USER, "stream": True, "max_tokens": 2}
    made = httpx.post(server.url + "/v1/messages", json=body)
    assert made.headers["content-type"].startswith("text/event-stream")
    assert made.headers["request-id"] == made.headers["x-request-id"]
    pairs = [block.split("\n") for block in made.text.strip().split("\n\n")]
    assert all(
        json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
        for name, data in pairs
    )
    assert pairs[1][0] == "event: ping"


def test_a_conversation_is_the_same_chat(client: anthropic.Anthropic, server: ServerProcess) -> None:
    """Blocks and messages of OpenAI's that say the same are one prompt, with one answer."""
    template = (
        "{% for m in messages %}{{ m.role }} {{ m.reasoning_content or '' }} {{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{{ c.id }}"
        "{% endfor %}{{ m.tool_call_id or '' }}\n{% endfor %}"
    )
    blocks: Any = [
        {"role": "user", "content": "Weather"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "in Rome?", "cache_control": {"type": "ephemeral"}}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}},
                {"type": "tool_use", "id": "toolu_2", "name": "get_weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "Sun."}],
                },
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no city", "is_error": True},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    note = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"  # Claude Code's
    system = [{"type": "text", "text": text} for text in (note, "Be brief.")]
    asked = asking({"chat_template": template}, messages=blocks, system=system)
    calls = [
        {
            "id": "toolu_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
        },
        {"id": "toolu_2", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
    ]
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather\nin Rome?"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Sun."},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "no city"},
        {"role": "user", "content": "So?"},
    ]
    chats = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS)
    chat = chats.chat.completions.create(
        model="smol", temperature=0, max_tokens=5, messages=messages, extra_body={"chat_template": template}
    )
    made = client.messages.create(**asked)
    assert "".join(block.text for block in made.content) == chat.choices[0].message.content
    assert total(made.usage) == chat.usage.prompt_tokens
    del asked["max_tokens"]
    assert client.messages.count_tokens(**asked).input_tokens == chat.usage.prompt_tokens
    tools = {"tools": [TOOL], "tool_choice": {"type": "none"}}
    assert client.messages.count_tokens(**asked, **tools).input_tokens == chat.usage.prompt_tokens


def test_more_tokens_than_the_context_has_may_be_asked_for(client: anthropic.Anthropic) -> None:
    """Clients do, as the largest models have them; a prompt has to fit."""
    asked = asking(max_tokens=32_000, stop_sequences=["e"])
    assert client.messages.create(**asked).stop_sequence == "e"
    with pytest.raises(anthropic.BadRequestError, match="context of 512"):
        client.messages.create(**asked | {"messages": [{"role": "user", "content": "colour " * 600}]})


def test_a_schema_is_followed(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    made = client.messages.create(**asking(output_config=config, max_tokens=40))
    assert made.stop_reason == "end_turn"
    jsonschema.validate(json.loads(made.content[0].text), schema)


def test_what_has_no_effect_is_said(client: anthropic.Anthropic) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    asked = asking({"wish": 1}, max_tokens=1, thinking=thinking, metadata={"user_id": "x"})
    made = client.messages.with_raw_response.create(**asked)
    assert made.headers["x-makeready-ignored-fields"] == "wish, thinking.budget_tokens, thinking"


RESULT = {"type": "tool_result", "tool_use_id": "x"}
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [RESULT | {"content": [IMAGE]}]}]}, "'image'"),
        ({"messages": [*USER, {"role": "assistant", "content": "In"}]}, "begun"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "y", "input": 1}]}]},
         "input must be an object"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": "hot"}}, "temperature"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"tools": [TOOL], "tool_choice": NAMED | {"name": "other"}}, "no such function"),
        ({"tool_choice": {"type": "some"}}, "auto, any, tool or none"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "display"),
        ({"extra_body": {"container": "x"}}, "container"),
        ({"model": 3}, "model"),
        ({"extra_body": {"chat_template": "x.jinja"}}, "files are not read"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(client: anthropic.Anthropic, more: Any, said: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=said) as refused:
        client.messages.create(**asking() | more)
    body: Any = refused.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["request_id"] == refused.value.request_id


def test_a_model_that_is_not_there(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**asking(model="claude"))
    body: Any = missing.value.body
    assert body["error"]["type"] == "not_found_error"


def test_keys_come_in_either_header() -> None:
    asked: Any = {"model": "fake", "max_tokens": 1, "messages": USER}
    with served(ServerSettings(["fake"], api_keys=["secret"])) as server:
        for key in ({"api_key": "secret"}, {"auth_token": "secret"}):
            client = anthropic.Anthropic(base_url=server.url, max_retries=0, **key)
            with pytest.raises(anthropic.BadRequestError, match="tokenizer"):  # behind the door
                client.messages.create(**asked)
        client = anthropic.Anthropic(base_url=server.url, max_retries=0, api_key="guess")
        with pytest.raises(anthropic.AuthenticationError) as refused:
            client.messages.create(**asked)
        body: Any = refused.value.body
        assert body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "b": [1, 2.5, {"c": "x\\"y\\\\"}, []], "d": {}, "e": null, "f": true, "g": "é\\u00e9}{,:"}',
        '{"x": {"y": {"z": [[["q"], -1e3]]}}}',
        '{ "a" : "b" , "c" : 3 }',
        "{}",
    ],
)
def test_the_beginning_of_an_object(text: str) -> None:
    """As jiter reads it, which the client reads streams with, but without a number or a word that may go on."""
    for end in range(1, len(text)):
        begun = text[:end]
        sure = re.sub(r"[\w.+-]+\s*$", "", begun)
        assert beginning_of(begun) == jiter.from_json(sure.encode(), partial_mode=True), begun
    assert beginning_of(text) == json.loads(text)
    assert beginning_of("") == beginning_of("[1") == beginning_of('"x"') == {}
