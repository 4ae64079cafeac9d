"""Conversations of ``/api/chat``, as chat templates take them.

Source: Ollama's API reference, "Generate a chat message", "Tool calling" (https://docs.ollama.com/api/chat).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.protocol.asked import AskError, kind_of


def messages_of(given: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages, whose calls get ids, where they have none, which results repeat by the names of tools.

    Raises:
        AskError: one is malformed, or has an image.
    """
    made: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # names and ids of calls without a result
    count = 0
    for place, message in enumerate(given):
        name = f"messages[{place}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise AskError(f"{name} must be an object with a role", "messages")
        if message.get("images"):
            raise AskError(f"{name}.images: the model reads text alone; leave them out", "messages")
        for field in ("content", "thinking", "tool_name", "tool_call_id"):
            if not isinstance(message.get(field), str | None):
                raise AskError(f"{name}.{field} must be a string, not {kind_of(message[field])}", "messages")
        role = message["role"]
        one: dict[str, Any] = {"role": role, "content": message.get("content") or ""}
        if role == "tool":
            one |= _result(message, waiting)
        elif role == "assistant":
            if message.get("thinking"):
                one["reasoning_content"] = message["thinking"]
            calls = _calls(name, message.get("tool_calls") or [], count)
            count += len(calls)
            if calls:
                one |= {"content": message.get("content") or None, "tool_calls": calls}
                waiting = [(call["function"]["name"], call["id"]) for call in calls]
        made.append(one)
    return made


def _result(message: Mapping[str, Any], waiting: list[tuple[str, str]]) -> dict[str, Any]:
    """Name and id of the call that a result is of: the one it names, the first of that tool, or the first."""
    tool, stated = message.get("tool_name"), message.get("tool_call_id")
    found = [call for call in waiting if stated == call[1] or (stated is None and tool in (None, call[0]))]
    if found:
        waiting.remove(found[0])
        tool, stated = found[0]
    given = {"name": tool, "tool_call_id": stated}
    return {name: value for name, value in given.items() if value is not None}


def _calls(name: str, given: Any, count: int) -> list[dict[str, Any]]:
    if not isinstance(given, list):
        raise AskError(f"{name}.tool_calls must be a list, not {kind_of(given)}", "messages")
    made = []
    for place, call in enumerate(given):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise AskError(f"{name}.tool_calls[{place}] needs a function with a name", "messages")
        arguments = function.get("arguments", {})
        if not isinstance(arguments, Mapping):
            raise AskError(
                f"{name}.tool_calls[{place}].function.arguments must be an object, not {kind_of(arguments)}",
                "messages",
            )
        stated = call.get("id")
        # Nine characters, as Mistral's templates want them.
        identity = stated if isinstance(stated, str) and stated else f"call{count + place:05d}"
        inner = {"name": function["name"], "arguments": arguments}
        made.append({"id": identity, "type": "function", "function": inner})
    return made
