"""Whatever JSON stands at a place of a body: it is read, or refused in a sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from makeready.engine.protocol.anthropic import body as anthropics
from makeready.engine.protocol.asked import Ask, AskError
from makeready.engine.protocol.ollama import body as ollamas

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    "",
    "x",
    "user",
    [],
    [1],
    [[]],
    [{}],
    {},
    {"type": []},
    {"x": 1},
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
MESSAGE = {
    "model": "m",
    "max_tokens": 3,
    "stream": True,
    "temperature": 0.5,
    "stop_sequences": ["a"],
    "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "x", "signature": "x"},
                {"type": "tool_use", "id": "x", "name": "x", "input": {"city": "x"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "x",
                    "content": [{"type": "text", "text": "x"}],
                    "is_error": True,
                },
                {"type": "text", "text": "x"},
            ],
        },
    ],
    "tools": [{"name": "x", "description": "x", "input_schema": SCHEMA, "type": "custom"}],
    "tool_choice": {"type": "tool", "name": "x", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 3, "display": "summarized"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "metadata": {"user_id": "x"},
    "mcp_servers": [],
    "chat_template_kwargs": {"x": 1},
}
SHARED = {
    "model": "m",
    "stream": False,
    "think": "low",
    "format": SCHEMA,
    "keep_alive": "5m",
    "logprobs": True,
    "top_logprobs": 1,
    "options": {"num_predict": 3, "seed": 3, "stop": ["x"], "mirostat": 0, "num_ctx": 9, "temperature": 0.5},
    "chat_template_kwargs": {"x": 1},
}
CALLS = [{"id": "x", "function": {"index": 0, "name": "x", "arguments": {"city": "x"}}}]
CHAT = SHARED | {
    "messages": [
        {"role": "user", "content": "x", "images": []},
        {"role": "assistant", "content": "x", "thinking": "x", "tool_calls": CALLS},
        {"role": "tool", "tool_name": "x", "tool_call_id": "x", "content": "x"},
    ],
    "tools": [{"type": "function", "function": {"name": "x", "description": "x", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "x"}},
}
GENERATE = SHARED | {"prompt": "x", "system": "x", "raw": False, "suffix": "", "template": "", "context": []}
READERS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "anthropic": (anthropics.read, MESSAGE),
    "chat": (partial(ollamas.read, ollamas.CHAT), CHAT),
    "generate": (partial(ollamas.read, ollamas.GENERATE), GENERATE),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all that stands in a body."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from places(item, (*path, name))


@pytest.mark.parametrize("name", READERS)
def test_a_body_is_read_or_refused(name: str) -> None:
    read, body = READERS[name]
    assert isinstance(ask_of(read(body)), Ask)
    refused = 0
    for *path, last in places(body):
        for value in VALUES:
            changed = copy.deepcopy(body)
            inner: Any = changed
            for step in path:
                inner = inner[step]
            inner[last] = value
            try:
                assert isinstance(ask_of(read(changed)), Ask | None)
            except AskError:
                refused += 1
            except Exception as error:
                raise AssertionError((*path, last, value)) from error
    assert refused > 100


def ask_of(made: Any) -> Any:
    return made[0] if isinstance(made, tuple) else made.ask
