"""What a family's file says its rules of calls with, in llguidance's Lark; see engine/text/message_grammar.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.text.lark import Behind, Lark


@dataclass(frozen=True)
class Tool:
    """A function that may be called.

    Attributes:
        name: of the function.
        arguments: the schema of its arguments.
        strict: it is called with arguments of this schema, and never with others.
    """

    name: str
    arguments: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class Written:
    """How a family writes calls of some tools, as expressions of a grammar.

    Attributes:
        calls: a message of nothing but calls.
        behind: of each marker that calls begin with in free text, what follows it.
        unmarked: a message of nothing but calls that has no marker; "" for a family that has none.
        others: patterns that a message with ``unmarked`` fits and no other one does.
    """

    calls: str
    behind: Behind = field(default_factory=dict)
    unmarked: str = ""
    others: Sequence[str] = ()


Rules = Callable[
    [Sequence[Tool], bool, Lark], Written
]  # of the tools, and whether there may be several calls
# The whole message: with tools of which one may be called, or has to be; or with an answer that follows ``@content``.
# Also told what of it the prompt has opened.
MessageRules = Callable[[Sequence[Tool], bool, bool, str, Lark], str]


def tool_of(said: Mapping[str, Any]) -> Tool:
    """A tool as requests describe it; see :func:`makeready.engine.tools.check_tools`."""
    function = said.get("function", said)
    arguments = function.get("parameters") or {"type": "object"}
    return Tool(function["name"], arguments, bool(function.get("strict")))


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
