"""Conversations of ``/v1/messages``, as chat templates take them: blocks become texts, calls and tools' results.

Source: Anthropic's API reference, "Messages" and "Tool use" (https://docs.anthropic.com/en/api/messages).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from makeready.engine.protocol.asked import AskError, kind_of

_ROLES = ("user", "assistant", "system")
# What Claude Code writes for the bill, another one in each request, in front of all that could be cached.
_NOTE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")


def messages_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``system`` and ``messages`` of a body.

    Neighbours of one role are one turn, as the API has it, and results of tools are messages of their own.

    Raises:
        AskError: naming the block, where it is malformed or of a kind that is not read.
    """
    made: list[dict[str, Any]] = []
    if "system" in body:
        texts = [_NOTE.sub("", text) for text in _texts("system", body["system"])]
        if any(texts):
            made.append({"role": "system", "content": [text for text in texts if text]})
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise AskError("messages must be a list of at least one message", "messages")
    for place, message in enumerate(given):
        name = f"messages[{place}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES:
            raise AskError(f"{name} must be an object whose role is user or assistant", "messages")
        if role == "assistant":
            _assistant(name, message.get("content"), made)
        else:
            _said(name, role, message.get("content"), made)
    if made[-1]["role"] not in ("user", "tool"):
        raise AskError(
            "messages must end with one of the user: an answer that is begun already is not gone on with",
            "messages",
        )
    return [{**message, "content": _content(message)} for message in made]


def _said(name: str, role: str, content: Any, made: list[dict[str, Any]]) -> None:
    """What the user, or an operator in the middle, says."""
    for block_name, block in _blocks(name, content):
        if block["type"] == "tool_result" and role == "user":
            result = {
                "role": "tool",
                "tool_call_id": _string(block_name, block, "tool_use_id"),
                "content": _texts(f"{block_name}.content", block.get("content", "")),
            }
            # No template of those known reads it; one that does can tell.
            made.append(result | ({"is_error": True} if block.get("is_error") is True else {}))
        else:
            _turn(made, role)["content"].append(_text(block_name, block))


def _assistant(name: str, content: Any, made: list[dict[str, Any]]) -> None:
    """What the model said."""
    message = _turn(made, "assistant")
    for block_name, block in _blocks(name, content):
        if block["type"] == "thinking":
            thought = message.get("reasoning_content", "")
            message["reasoning_content"] = thought + _string(block_name, block, "thinking")
        elif block["type"] == "tool_use":
            given = block.get("input")
            if not isinstance(given, Mapping):
                raise AskError(f"{block_name}.input must be an object, not {kind_of(given)}", "messages")
            function = {"name": _string(block_name, block, "name"), "arguments": given}
            call = {"id": _string(block_name, block, "id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        else:
            message["content"].append(_text(block_name, block))


def _turn(made: list[dict[str, Any]], role: str) -> dict[str, Any]:
    """The message of a role that goes on, or begins."""
    if not made or made[-1]["role"] != role:
        made.append({"role": role, "content": []})
    return made[-1]


def _content(message: Mapping[str, Any]) -> Any:
    """A text, or parts where there are several; null for an answer of none."""
    texts = message["content"]
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts]
    return texts[0] if texts else None if message["role"] == "assistant" else ""


def _texts(name: str, content: Any) -> list[str]:
    return [_text(block_name, block) for block_name, block in _blocks(name, content, "")]


def _blocks(name: str, content: Any, under: str = ".content") -> list[tuple[str, Mapping[str, Any]]]:
    """Blocks with what errors call them."""
    if isinstance(content, str):
        return [(f"{name}{under}", {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise AskError(
            f"{name}{under} must be a string or a list of blocks, not {kind_of(content)}", _field(name)
        )
    made = []
    for place, block in enumerate(content):
        block_name = f"{name}{under}[{place}]"
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            raise AskError(f"{block_name} must be an object with a type", _field(name))
        made.append((block_name, block))
    return made


def _text(name: str, block: Mapping[str, Any]) -> str:
    if block["type"] != "text":
        raise AskError(
            f"{name} is of type {block['type'][:40]!r}, which is not read here; the model reads text, tool_use, "
            "tool_result and thinking",
            _field(name),
        )
    return _string(name, block, "text")


def _string(name: str, block: Mapping[str, Any], field: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise AskError(f"{name}.{field} must be a string, not {kind_of(value)}", _field(name))
    return value


def _field(name: str) -> str:
    return "system" if name.startswith("system") else "messages"
