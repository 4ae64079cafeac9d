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
        tool_choice: ``auto`` or ``none``, which also keeps the tools out of the prompt.
        parallel_tool_calls: whether there may be several calls; else the answer ends behind the first.

    Raises:
        RequestError: one is of the wrong type, or asks for what only constrained decoding can promise.
    """
    if tools is not None and not isinstance(tools, list | tuple):
        raise RequestError(f"tools={shown(tools)} must be a list of functions; write [{_REMEDY}]")
    for place, tool in enumerate(tools or ()):
        _check_tool(f"tools[{place}]", tool)
    if parallel_tool_calls is not None:
        boolean("parallel_tool_calls", parallel_tool_calls)
    if tool_choice == "required" or isinstance(tool_choice, Mapping):
        raise RequestError(
            f"tool_choice={shown(tool_choice)} promises a call, which needs constrained decoding, and that is not "
            'served; use "auto" or "none"'
        )
    if tool_choice not in (None, "auto", "none"):
        raise RequestError(f'tool_choice={shown(tool_choice)} must be "auto" or "none"')
    return bool(tools) and tool_choice != "none"


def _check_tool(name: str, tool: Any) -> None:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(f"{name}={shown(tool)} must be a function; write {_REMEDY}")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{name} needs a function with a name; write {_REMEDY}")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise RequestError(f"parameters of {name} must be a JSON schema, not {shown(function['parameters'])}")
    if function.get("strict"):
        raise RequestError(
            f"strict of {name} promises arguments of its schema, which needs constrained decoding, and that is not "
            "served; leave it out"
        )
