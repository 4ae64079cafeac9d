"""What a family's file says its rules of calls with, in llguidance's Lark; see engine/text/message_grammar.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Between two tokens of JSON: a space, or a line break and an indentation. Without a bound, models that may write
# nothing else write blanks until their limit.
BLANKS = r" |\n {0,40}"

Spell = Callable[[str], str]  # a marker as a symbol: its token where it is one, else its text


@dataclass(frozen=True)
class Tool:
    """A function that may be called, and the schema of its arguments."""

    name: str
    arguments: Mapping[str, Any]


# Of the tools, whether there may be several calls, and how markers are spelled: rules, of which one is ``calls``.
Rules = Callable[[Sequence[Tool], bool, Spell], list[str]]


def tool_of(said: Mapping[str, Any]) -> Tool:
    """A tool as requests describe it; see :func:`makeready.engine.tools.check_tools`."""
    function = said.get("function", said)
    return Tool(function["name"], function.get("parameters") or {"type": "object"})


def call_object(tools: Sequence[Tool], arguments: str = "arguments") -> dict[str, Any]:
    """The schema of ``{"name": ..., "arguments": {...}}`` of any of the tools."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, arguments: tool.arguments},
                "required": ["name", arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    }


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    """A rule for JSON of a schema."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': BLANKS}})}"
