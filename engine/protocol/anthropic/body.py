"""Bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``: what they ask for.

Source of the fields: Anthropic's API reference, "Create a Message" and "Count tokens in a Message"
(https://docs.anthropic.com/en/api/messages).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.protocol.anthropic.conversation import messages_of
from makeready.engine.protocol.asked import (
    ROUTING,
    Ask,
    AskError,
    check_template,
    kind_of,
    routing_of,
    text_of,
    tools_of,
)
from makeready.engine.protocol.schema import OBJECT, STRING, body_schema

# Field of a body → ours.
SAMPLING = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop_sequences": "stop",
}
READ = ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "stream")
OURS = ("chat_template", "chat_template_kwargs", *ROUTING)
# By these values they ask for nothing that is not done anyway; by others they are refused.
IDLE: Mapping[str, Sequence[Any]] = {
    "container": (),
    "mcp_servers": ([],),
    "inference_geo": (),
    "speed": ("standard",),
}
# They change nothing in an answer: who asks, how it is billed, what is kept of prompts, which is kept anyway.
WITHOUT_EFFECT = ("metadata", "service_tier", "cache_control")

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# What chat templates call the switch: those of Qwen3, SmolLM3 and GLM; those of DeepSeek V3.1, Granite and Kimi.
_SWITCHES = ("enable_thinking", "thinking")


def read(body: Mapping[str, Any], *, counts: bool = False) -> tuple[Ask, list[str]]:
    """What a body asks for, and the names of fields that it has for nothing; a null is a field that is not there.

    Args:
        counts: only its tokens are to be counted, for which ``max_tokens`` is not needed.

    Raises:
        AskError: a field is missing, of the wrong type, or of something that is not served.
    """
    body = {name: value for name, value in body.items() if value is not None}
    ignored = [name for name in body if name not in (*SAMPLING, *READ, *OURS, *IDLE, *WITHOUT_EFFECT)]
    for name, values in IDLE.items():
        if name in body and body[name] not in values:
            raise AskError(f"{name} is not supported; leave it out", name)
    if not isinstance(body.get("model", ""), str):
        raise AskError(f"model must be a string, not {kind_of(body['model'])}", "model")
    if not isinstance(body.get("stream", False), bool):
        raise AskError(f"stream must be true or false, not {kind_of(body['stream'])}", "stream")
    if "max_tokens" not in body and not counts:
        raise AskError("max_tokens is needed: how many tokens an answer may have", "max_tokens")
    if not isinstance(body.get("stop_sequences", []), list):
        raise AskError("stop_sequences must be a list of strings", "stop_sequences")
    sampling = {ours: body[theirs] for theirs, ours in SAMPLING.items() if theirs in body}
    template, more = _thinking(body.get("thinking"))
    ignored += more
    sampling |= _output(body, template, ignored)
    own = _object("chat_template_kwargs", body.get("chat_template_kwargs", {}))
    check_template(own)
    template |= own
    tools = {"tools": _tools(body["tools"])} if "tools" in body else {}
    tools |= _choice(body.get("tool_choice"))
    ask = Ask(
        "messages",
        (messages_of(body),),
        sampling,
        template,
        routing_of(body),
        text_of(body, "messages"),
        tools_of(tools, "messages", template),
        fit=True,
    )
    return ask, ignored


def schema(*, counts: bool = False) -> dict[str, Any]:
    """The JSON Schema of a body."""
    needed = ("messages",) if counts else ("messages", "max_tokens")
    tool = {"type": "object", "properties": {"name": STRING, "input_schema": OBJECT}, "required": ["name"]}
    return body_schema(
        (*READ, *OURS),
        SAMPLING,
        needed,
        tools={"type": "array", "items": tool},
        tool_choice=OBJECT,
        thinking=OBJECT,
        output_config=OBJECT,
    )


def wants_thinking(body: Mapping[str, Any]) -> bool:
    """Whether a body that was read asks the model to think."""
    return (body.get("thinking") or {}).get("type") in ("enabled", "adaptive")


def _thinking(given: Any) -> tuple[dict[str, Any], list[str]]:
    """Variables of the chat template that switch it, and fields that have no effect."""
    if given is None:
        return {}, []
    given = _object("thinking", given)
    kind = given.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise AskError("thinking.type must be enabled, adaptive or disabled", "thinking")
    if given.get("display") not in (None, "summarized"):
        raise AskError("thinking.display cannot omit what is thought; leave it out", "thinking")
    # Nothing makes a model end its thoughts at a number of tokens.
    ignored = ["thinking.budget_tokens"] if given.get("budget_tokens") is not None else []
    return dict.fromkeys(_SWITCHES, kind != "disabled"), ignored


def _output(body: Mapping[str, Any], template: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    """Sampling fields of ``output_config``, whose effort goes into variables of the chat template."""
    config = _object("output_config", body.get("output_config", {}))
    config = {name: value for name, value in config.items() if value is not None}
    ignored += [f"output_config.{name}" for name in config if name not in ("effort", "format")]
    if "effort" in config:
        if not isinstance(config["effort"], str):
            raise AskError("output_config.effort must be a string", "output_config")
        template["reasoning_effort"] = config["effort"]
    if "format" not in config:
        return {}
    form = _object("output_config.format", config["format"])
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), Mapping):
        raise AskError("output_config.format must be of type json_schema and have a schema", "output_config")
    return {"json_schema": form["schema"]}


def _tools(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list):
        raise AskError(f"tools must be a list, not {kind_of(given)}", "tools")
    made = []
    for place, tool in enumerate(given):
        tool = _object(f"tools[{place}]", tool)
        if tool.get("type") not in (None, "custom"):
            raise AskError(
                f"tools[{place}] is of type {str(tool['type'])[:40]!r}, which a server would have to run itself; "
                "tools with an input_schema are served alone",
                "tools",
            )
        if not isinstance(tool.get("input_schema"), Mapping):
            raise AskError(f"tools[{place}].input_schema must be a JSON schema", "tools")
        function = {
            name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None
        }
        made.append({"type": "function", "function": function | {"parameters": tool["input_schema"]}})
    return made


def _choice(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    given = _object("tool_choice", given)
    kind = given.get("type")
    if kind == "tool":
        choice: Any = {"type": "function", "function": {"name": given.get("name")}}
    elif isinstance(kind, str) and kind in _CHOICES:
        choice = _CHOICES[kind]
    else:
        raise AskError("tool_choice.type must be auto, any, tool or none", "tool_choice")
    single = given.get("disable_parallel_tool_use")
    if not isinstance(single, bool | None):
        raise AskError("tool_choice.disable_parallel_tool_use must be true or false", "tool_choice")
    return {"tool_choice": choice} | ({} if single is None else {"parallel_tool_calls": not single})


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise AskError(
            f"{name} must be an object, not {kind_of(value)}", name.partition("[")[0].partition(".")[0]
        )
    return dict(value)
