"""Tools that a request brings along: what may be said of them, in Python and in every protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.fields import boolean, shown

FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
_REMEDY = '{"type": "function", "function": {"name": ..., "parameters": ...}}'


def check_tools(tools: Any, tool_choice: Any = None, parallel_tool_calls: Any = None) -> bool:
    """Check the fields that speak of tools; returns whether the model may call any.

    Args:
        tools: a list of functions as OpenAI's API has them, or of what is under ``function`` alone.
        tool_choice: ``auto``; ``none``, which also keeps the tools out of the prompt; ``required`` for a call of any,
            or ``{"type": "function", "function": {"name": ...}}`` for one call of this.
        parallel_tool_calls: whether there may be several calls; else the answer ends behind the first.

    Raises:
        RequestError: one is of the wrong type, or names no tool.
    """
    if tools is not None and not isinstance(tools, list | tuple):
        raise RequestError(f"tools={shown(tools)} must be a list of functions; write [{_REMEDY}]")
    forced = tool_choice == "required" or isinstance(tool_choice, Mapping)
    for place, tool in enumerate(tools or ()):
        _check_tool(f"tools[{place}]", tool)
    if parallel_tool_calls is not None:
        boolean("parallel_tool_calls", parallel_tool_calls)
    if not forced and tool_choice not in (None, "auto", "none"):
        raise RequestError(
            f'tool_choice={shown(tool_choice)} must be "auto", "none", "required" or '
            '{"type": "function", "function": {"name": ...}}'
        )
    if forced and not forced_tools(tools, tool_choice):
        raise RequestError(
            f"tool_choice={shown(tool_choice)} asks for a call, and tools has no such function"
        )
    return bool(tools) and tool_choice != "none"


def has_strict(tools: Any) -> bool:
    """Whether any tool has to be called with arguments of its schema; what is wrong with tools is said elsewhere."""
    said = [tool.get("function", tool) for tool in _listed(tools) if isinstance(tool, Mapping)]
    return any(isinstance(function, Mapping) and function.get("strict") is True for function in said)


def _listed(tools: Any) -> Any:
    return tools if isinstance(tools, list | tuple) else ()


def forced_tools(tools: Any, tool_choice: Any) -> tuple[Any, ...]:
    """The tools of which one has to be called; none where none has."""
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function", tool_choice)
        wanted = function.get("name") if isinstance(function, Mapping) else None
        return tuple(tool for tool in tools or () if tool.get("function", tool).get("name") == wanted)[:1]
    return tuple(tools or ()) if tool_choice == "required" else ()


def _check_tool(name: str, tool: Any) -> None:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(f"{name}={shown(tool)} must be a function; write {_REMEDY}")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{name} needs a function with a name; write {_REMEDY}")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise RequestError(f"parameters of {name} must be a JSON schema, not {shown(function['parameters'])}")
    if function.get("strict") is not None:
        boolean(f"strict of {name}", function["strict"])
