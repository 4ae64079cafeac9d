"""Bodies of ``/api/chat`` and ``/api/generate``: what they ask for.

Source of the fields: Ollama's API reference, "Generate a chat message" and "Generate a response"
(https://docs.ollama.com/api), and of the options its Modelfile reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from makeready.engine.protocol.ollama.conversation import messages_of
from makeready.engine.protocol.schema import BOOLEAN, INTEGER, OBJECT, STRING, body_schema
from makeready.engine.tools import FIELDS as TOOLS

CHAT, GENERATE = "/api/chat", "/api/generate"

# Option → our sampling field.
SAMPLING = {
    "num_predict": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "sampling_seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
# Options that change how tokens are drawn, in ways that are not ours; by these values they do not.
IDLE_OPTIONS: Mapping[str, Sequence[Any]] = {
    "mirostat": (0,),
    "tfs_z": (1,),
    "typical_p": (1,),
}
READ = (
    *("model", "stream", "options", "format", "think", "logprobs", "top_logprobs", "keep_alive"),
    *("chat_template", "chat_template_kwargs", *ROUTING),
)
OWN = {CHAT: ("messages", *TOOLS), GENERATE: ("prompt", "system", "raw")}
# By these values they ask for nothing; by others they are refused.
IDLE: Mapping[str, Sequence[Any]] = {
    "template": ("",),
    "suffix": ("",),
    "images": ([],),
    "context": ([],),
}
# As above, of the chat template.
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        ask: None where the model is only to be loaded.
        stream: line by line.
        think: the model is to think, which not every one can.
        ignored: fields and options that it has for nothing.
    """

    ask: Ask | None
    stream: bool
    think: bool
    ignored: Sequence[str]


def read(url: str, body: Mapping[str, Any]) -> Asked:
    """What a body asks for; a null is a field that is not there.

    Args:
        url: :data:`CHAT` or :data:`GENERATE`.

    Raises:
        AskError: a field is of the wrong type, or of something that is not served.
    """
    body = {name: value for name, value in body.items() if value is not None}
    for name, values in IDLE.items():
        if name in body and body[name] not in values:
            raise AskError(f"{name} is not supported; leave it out{_REMEDIES.get(name, '')}", name)
    if not isinstance(body.get("model", ""), str):
        raise AskError(f"model must be a string, not {kind_of(body['model'])}", "model")
    for name in ("stream", "raw", "logprobs"):
        if not isinstance(body.get(name, False), bool):
            raise AskError(f"{name} must be true or false, not {kind_of(body[name])}", name)
    sampling, ignored = _options(body)
    ignored += [name for name in body if name not in (*READ, *OWN[url], *IDLE)]
    sampling |= _format(body.get("format", "")) | _logprobs(body)
    template = _thinking(body.get("think"))
    own = body.get("chat_template_kwargs", {})
    if not isinstance(own, Mapping):
        raise AskError("chat_template_kwargs must be an object", "chat_template_kwargs")
    check_template(own)
    template |= own
    make = _chat if url == CHAT else _generate
    return Asked(
        make(body, sampling, template),
        body.get("stream", True),
        body.get("think", False) is not False,
        [*ignored, "keep_alive"] if _unloads(body) else ignored,
    )


def schema(url: str) -> dict[str, Any]:
    """The JSON Schema of a body."""
    own = {"prompt": STRING, "system": STRING} if url == GENERATE else {}
    return body_schema(
        (*READ, *OWN[url]),
        required=("messages",) if url == CHAT else (),
        options=body_schema((), SAMPLING),
        format={"anyOf": [{"enum": ["", "json"]}, OBJECT]},
        think={"anyOf": [BOOLEAN, STRING]},
        logprobs=BOOLEAN,
        top_logprobs=INTEGER,
        **own,
    )


_REMEDIES = {
    "template": "; chat_template takes a template in Jinja",
    "context": ", and send the conversation to /api/chat",
    "images": ": the model reads text alone",
}


def _chat(body: Mapping[str, Any], sampling: dict[str, Any], template: dict[str, Any]) -> Ask | None:
    given = body.get("messages", [])
    if not isinstance(given, list):
        raise AskError(f"messages must be a list, not {kind_of(given)}", "messages")
    if not given:
        return _nothing(body)
    text, tools = text_of(body, "messages"), tools_of(body, "messages", template)
    return Ask("messages", (messages_of(given),), sampling, template, routing_of(body), text, tools, fit=True)


def _generate(body: Mapping[str, Any], sampling: dict[str, Any], template: dict[str, Any]) -> Ask | None:
    for name in ("prompt", "system"):
        if not isinstance(body.get(name, ""), str):
            raise AskError(f"{name} must be a string, not {kind_of(body[name])}", name)
    prompt, system, routing = body.get("prompt", ""), body.get("system", ""), routing_of(body)
    if not prompt:
        return _nothing(body)
    if not body.get("raw"):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        return Ask("messages", (messages,), sampling, template, routing, text_of(body, "messages"), fit=True)
    for name in ("system", "think", "chat_template", "chat_template_kwargs"):
        if body.get(name):
            raise AskError(f"{name} is no part of a raw prompt; leave one of them out", name)
    return Ask("prompt", (prompt,), sampling, {}, routing, fit=True)


def _nothing(body: Mapping[str, Any]) -> None:
    """A body without a prompt has the model loaded, or unloaded."""
    if _unloads(body):
        raise AskError(
            "keep_alive: the model stays loaded as long as the server runs; stop that", "keep_alive"
        )


def _unloads(body: Mapping[str, Any]) -> bool:
    return body.get("keep_alive") in (0, "0", "0s", "0m", "0h")


def _options(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Sampling fields, and options that it has for nothing."""
    options = body.get("options", {})
    if not isinstance(options, Mapping):
        raise AskError(f"options must be an object, not {kind_of(options)}", "options")
    options = {name: value for name, value in options.items() if value is not None}
    for name, values in IDLE_OPTIONS.items():
        if name in options and options[name] not in values:
            raise AskError(f"options.{name} is not supported; leave it out", "options")
    sampling = {ours: options[theirs] for theirs, ours in SAMPLING.items() if theirs in options}
    if _negative(sampling.get("sampling_seed")):
        del sampling["sampling_seed"]  # a seed of no one's choice
    most = sampling.get("max_new_tokens")
    if _negative(most) or (most == 0 and not isinstance(most, bool)):
        del sampling["max_new_tokens"]  # as many as fit
    known = (*SAMPLING, *IDLE_OPTIONS)
    return sampling, [f"options.{name}" for name in options if name not in known]


def _negative(value: Any) -> bool:
    return isinstance(value, int | float) and value < 0


def _format(given: Any) -> dict[str, Any]:
    if given == "":
        return {}
    if given == "json":
        return {"json_schema": {"type": "object"}}
    if isinstance(given, Mapping):
        return {"json_schema": given}
    raise AskError('format must be "json" or a JSON schema', "format")


def _logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    if not body.get("logprobs"):
        return {}
    return {"return_logprob": True, "top_logprobs_num": body.get("top_logprobs", 0)}


def _thinking(given: Any) -> dict[str, Any]:
    """Variables of the chat template that switch it."""
    if given is None:
        return {}
    if not isinstance(given, bool | str) or given == "":
        raise AskError('think must be true, false, or how much, such as "low"', "think")
    made: dict[str, Any] = dict.fromkeys(_SWITCHES, given is not False)
    return made | ({"reasoning_effort": given} if isinstance(given, str) else {})
