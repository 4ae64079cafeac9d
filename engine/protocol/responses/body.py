"""Bodies of ``/v1/responses``, as bodies of chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.protocol.asked import AskError, kind_of
from makeready.engine.protocol.schema import OBJECT, STRING, body_schema

# Fields of ours → those of a chat that say the same.
RENAMED = {
    "model": "model",
    "max_output_tokens": "max_completion_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "parallel_tool_calls": "parallel_tool_calls",
    "chat_template": "chat_template",
    "chat_template_kwargs": "chat_template_kwargs",
}
READ = ("input", "instructions", "tools", "tool_choice", "text", "reasoning", "stream")
# By these values they ask for nothing that is not done anyway; by others they are refused.
IDLE: Mapping[str, Sequence[Any]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "include": ([],),
    "stream_options": ({}, {"include_obfuscation": False}),
}
# They change nothing in an answer. What is to be stored is not: there is no memory.
WITHOUT_EFFECT = (
    *("store", "metadata", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("service_tier", "max_tool_calls"),
)
_TEXTS = ("input_text", "output_text", "text")


def unknown(body: Mapping[str, Any]) -> list[str]:
    """Fields that mean nothing here."""
    known = {*RENAMED, *READ, *IDLE, *WITHOUT_EFFECT}
    return [name for name, value in body.items() if name not in known and value is not None]


def schema() -> dict[str, Any]:
    """The JSON Schema of a body."""
    items = {"anyOf": [STRING, {"type": "array", "items": OBJECT}]}
    tools = {"type": "array", "items": OBJECT}
    return body_schema(
        (*RENAMED, *READ),
        {"max_output_tokens": "max_new_tokens"},
        ("input",),
        input=items,
        instructions=STRING,
        tools=tools,
        text=OBJECT,
        reasoning=OBJECT,
    )


def chat_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat that asks for the same; a null is a field that is not there.

    Raises:
        AskError: a field is of the wrong type, or of something that is not served.
    """
    body = {name: value for name, value in body.items() if value is not None}
    for name, values in IDLE.items():
        if name in body and body[name] not in values:
            raise AskError(
                f"{name} is not supported; leave it out, and send the whole conversation as input", name
            )
    chat = {theirs: body[ours] for ours, theirs in RENAMED.items() if ours in body}
    chat["messages"] = [*_instructions(body), *_messages(body.get("input"))]
    if "tools" in body:
        chat["tools"] = _tools(body["tools"])
    choice = body.get("tool_choice")
    if choice is not None:
        named = isinstance(choice, Mapping) and choice.get("type") == "function"
        chat["tool_choice"] = (
            {"type": "function", "function": {"name": choice.get("name")}} if named else choice
        )
    if (form := _object(body, "text").get("format")) is not None:
        chat["response_format"] = _format(form)
    if (effort := _object(body, "reasoning").get("effort")) is not None:
        chat["reasoning_effort"] = effort
    return chat


def _instructions(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = body.get("instructions", "")
    if not isinstance(given, str):
        raise AskError(f"instructions must be a string, not {kind_of(given)}", "instructions")
    return [{"role": "system", "content": given}] if given else []


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise AskError(f"input must be a string or a list of items, not {kind_of(given)}", "input")
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise AskError(f"input[{place}] must be an object, not {kind_of(item)}", "input")
        kind = item.get("type", "message")
        if kind == "message":
            _message(f"input[{place}]", item, messages)
        elif kind == "reasoning":
            _assistant(messages)["reasoning_content"] = _text(
                f"input[{place}].content", item.get("content") or []
            )
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _text(f"input[{place}].output", item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        else:
            raise AskError(f"input[{place}] is of type {kind!r}, which is not supported", "input")
    return messages


def _message(name: str, item: Mapping[str, Any], messages: list[dict[str, Any]]) -> None:
    content = _text(f"{name}.content", item.get("content"))
    last = messages[-1] if messages else {}
    # Reasoning of an answer stands before it, as an item of its own.
    if item.get("role") == "assistant" and last.get("role") == "assistant" and last.get("content") is None:
        last["content"] = content
    else:
        messages.append({"role": item.get("role"), "content": content})


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer that an item is a part of."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise AskError(f"{name} must be a string or a list of parts, not {kind_of(content)}", "input")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in (*_TEXTS, "reasoning_text") or not isinstance(text, str):
            raise AskError(f"{name} has a part of type {kind!r}; texts are taken alone", "input")
        texts.append(text)
    return "\n".join(texts)


def _tools(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise AskError(f"tools must be a list, not {kind_of(given)}", "tools")
    made = []
    for place, tool in enumerate(given):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else kind_of(tool)
            raise AskError(f"tools[{place}] is of type {kind!r}; functions are served alone", "tools")
        # The client's libraries set strict where nobody asked for it.
        function = {name: value for name, value in tool.items() if name not in ("type", "strict")}
        made.append({"type": "function", "function": function})
    return made


def _format(form: Any) -> Any:
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        inner = {name: value for name, value in form.items() if name != "type"}
        return {"type": "json_schema", "json_schema": inner}
    return form


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name, {})
    if not isinstance(value, Mapping):
        raise AskError(f"{name} must be an object, not {kind_of(value)}", name)
    return value
