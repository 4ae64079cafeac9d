"""Responses, by OpenAI's own client against a real server with a real model."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest
from server_process import WAIT_SECONDS, ServerProcess
from test_openai_client import TEMPLATE, TOOLS

TOOL: Any = {"type": "function", **TOOLS[0]["function"], "strict": True}
FIXED: dict[str, Any] = {"model": "smol", "temperature": 0}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_SECONDS)


def without_ids(items: Any) -> list[dict[str, Any]]:
    """Items without what differs by chance, and what the client adds."""
    left = ("id", "parsed_arguments")
    return [{name: value for name, value in item.to_dict().items() if name not in left} for item in items]


@pytest.mark.parametrize("thinks", [False, True])
def test_a_stream_is_the_plain_response(client: openai.OpenAI, thinks: bool) -> None:
    """The client puts the events together by itself, and complains where one is missing or wrong."""
    asked = FIXED | {
        "input": "Weather in London?",
        "max_output_tokens": 40,
        "tools": [TOOL],
        "tool_choice": "auto",
    }
    if thinks:
        asked |= {"max_output_tokens": 6}
    asked |= {"extra_body": {"chat_template": TEMPLATE, "chat_template_kwargs": {"thinks": thinks}}}
    plain = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    streamed = events[-1].response
    assert without_ids(streamed.output) == without_ids(plain.output)
    assert (streamed.status, streamed.usage.output_tokens) == (plain.status, plain.usage.output_tokens)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    if thinks:
        assert (plain.status, plain.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert plain.output[0].type == "reasoning"
        assert 0 < plain.usage.output_tokens_details.reasoning_tokens <= 6
        return
    (call,) = [item for item in plain.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "London"})
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 3


def test_a_conversation_goes_on_from_its_items(client: openai.OpenAI) -> None:
    """Items and messages of a chat that say the same are one prompt."""
    first = client.responses.create(
        **FIXED, input="Name a colour.", max_output_tokens=5, instructions="Be brief."
    )
    assert first.output_text
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Name a colour."}]},
        *(item.to_dict() for item in first.output),
        {"role": "user", "content": "Another."},
    ]
    going_on = client.responses.create(**FIXED, input=items, max_output_tokens=5, instructions="Be brief.")
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Another."},
    ]
    chat = client.chat.completions.create(**FIXED, messages=messages, max_tokens=5)
    assert going_on.output_text == chat.choices[0].message.content
    assert going_on.usage.input_tokens == chat.usage.prompt_tokens


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"n": digit}, "required": ["n"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    made = client.responses.create(**FIXED, input="A number.", text=form, max_output_tokens=40)
    assert made.status == "completed"
    jsonschema.validate(json.loads(made.output_text), schema)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": 1}, "text"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client: openai.OpenAI, more: Any, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{**FIXED, "input": "x", **more})
    assert refused.value.param == field
