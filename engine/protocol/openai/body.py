"""Bodies of requests for chat and completions: what they ask for.

Source of the fields: OpenAI's API reference, "Create chat completion" and "Create completion"
(https://platform.openai.com/docs/api-reference/chat/create, .../completions/create). A field that we cannot serve
is refused by name, unless its value says what happens anyway (``stream: false``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from makeready.engine.protocol.openai import structured
from makeready.engine.protocol.schema import body_schema

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# Field of a body → ours; the same for both urls. The second group is SGLang's.
SAMPLING = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "n": "n",
    "stop": "stop",
    "seed": "sampling_seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_new_tokens",
    "repetition_penalty": "repetition_penalty",
    "stop_token_ids": "stop_token_ids",
    "stop_regex": "stop_regex",
    "ignore_eos": "ignore_eos",
    "no_stop_trim": "no_stop_trim",
    "skip_special_tokens": "skip_special_tokens",
}
CHAT_SAMPLING = SAMPLING | {"max_completion_tokens": "max_new_tokens", "top_logprobs": "top_logprobs_num"}
CHAT_FIELDS = (
    *("model", "messages", "logprobs", "chat_template_kwargs", "chat_template", "add_special_tokens"),
    *("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"),
)
COMPLETION_FIELDS = ("model", "prompt", "logprobs", "echo", "add_special_tokens")

# Fields that ask for nothing by these values; by any other they are refused. null always asks for nothing.
IDLE: Mapping[str, Sequence[Any]] = {
    "stream": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),  # of a completion; chats have them
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
# Fields that change nothing in an answer, whatever they say: what the request is for, where it is to be kept, how
# it is to be billed.
WITHOUT_EFFECT: Mapping[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "service_tier": str,
    "metadata": dict,
    "store": bool,
}
# OpenAI's own limit of a completion; a chat's is the context.
COMPLETION_TOKENS = 16


def read(url: str, body: Mapping[str, Any]) -> Ask:
    """What a body asks for; a null is a field that is not there.

    Args:
        url: :data:`CHAT` or :data:`COMPLETIONS`.
        body: parsed JSON.

    Raises:
        AskError: a field is missing, of the wrong type, unknown, or of something that is not served.
    """
    body, chat = {name: value for name, value in body.items() if value is not None}, url == CHAT
    table = CHAT_SAMPLING if chat else SAMPLING
    known = _known(url)
    for name in body:
        if name not in known:
            _check_idle(name, body[name], known)
    if not isinstance(body.get("model"), str):
        raise AskError("model must be a string; the answer repeats it", "model")
    sampling = (
        _sampling(body, table)
        | structured.grammar_of(body)
        | (_chat_logprobs(body) if chat else _completion_logprobs(body))
    )
    if not chat:
        kind, prompts = prompts_of(body.get("prompt"))
        text = text_of(body, kind)
        return Ask(kind, prompts, sampling, {}, routing_of(body), text, max_new_tokens=COMPLETION_TOKENS)
    if not isinstance(body.get("messages"), list):
        raise AskError(f"messages must be a list, not {kind_of(body.get('messages'))}", "messages")
    template = body.get("chat_template_kwargs", {})
    if not isinstance(template, dict):
        raise AskError("chat_template_kwargs must be an object", "chat_template_kwargs")
    check_template(template)
    if "reasoning_effort" in body:
        if not isinstance(body["reasoning_effort"], str):
            raise AskError("reasoning_effort must be a string", "reasoning_effort")
        template = {"reasoning_effort": body["reasoning_effort"], **template}
    text, tools = text_of(body, "messages"), tools_of(body, "messages", template)
    messages = [*map(_message, body["messages"])]
    return Ask("messages", (messages,), sampling, template, routing_of(body), text, tools)


def _message(message: Any) -> Any:
    """A message in which what newer models call ``developer`` is ``system``, as templates know it."""
    developer = isinstance(message, Mapping) and message.get("role") == "developer"
    return {**message, "role": "system"} if developer else message


def unknown(url: str, body: Mapping[str, Any]) -> list[str]:
    """Fields of a body that mean nothing here; those that mean what is not served are not among them."""
    known = {*_known(url), *IDLE, *WITHOUT_EFFECT}
    return [name for name, value in body.items() if name not in known and value is not None]


def _known(url: str) -> tuple[str, ...]:
    chat = url == CHAT
    own, table = (CHAT_FIELDS, CHAT_SAMPLING) if chat else (COMPLETION_FIELDS, SAMPLING)
    return (*own, *table, *structured.FIELDS, *ROUTING)


def schema(url: str) -> dict[str, Any]:
    """The JSON Schema of a body."""
    chat, logprobs = url == CHAT, {"type": "boolean"} if url == CHAT else {"type": ["integer", "null"]}
    names = (*_known(url), "stream", "stream_options")
    table = CHAT_SAMPLING if chat else SAMPLING
    return body_schema(names, table, ("messages" if chat else "prompt",), logprobs=logprobs)


def prompts_of(prompt: Any) -> tuple[str, tuple[Any, ...]]:
    """A text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return "prompt", (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return "prompt", tuple(prompt)
        if not any(isinstance(item, str | list | dict | None.__class__) for item in prompt):
            return "token_ids", (prompt,)  # which of them are ids is checked with all others
        if all(isinstance(item, list) for item in prompt):
            return "token_ids", tuple(prompt)
    raise AskError(
        "prompt must be a string, a list of strings, token ids, or a list of lists of them", "prompt"
    )


def _sampling(body: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """Sampling fields of a body, under our names."""
    sampling: dict[str, Any] = {}
    for name, ours in table.items():
        if name in body:
            if ours in sampling and not _same(sampling[ours], body[name]):
                raise AskError("max_tokens and max_completion_tokens differ; give one of them", name)
            sampling[ours] = body[name]
    return sampling


def _check_idle(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise :class:`AskError` for a field that is none of ours, unless it asks for nothing."""
    if name in WITHOUT_EFFECT:
        kind = WITHOUT_EFFECT[name]
        if not isinstance(value, kind):
            raise AskError(f"{name} must be {_KINDS[kind]}, not {kind_of(value)}", name)
    elif not any(_same(value, idle) for idle in IDLE.get(name, ())):
        raise AskError(f"{name} is not supported; leave it out (fields are {', '.join(known)})", name)


def _same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are the same; 0 is not false."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _chat_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted = body.get("logprobs", False)
    if not isinstance(wanted, bool):
        raise AskError(f"logprobs must be true or false, not {kind_of(wanted)}", "logprobs")
    if "top_logprobs" in body and not wanted:
        raise AskError("top_logprobs needs logprobs: true", "top_logprobs")
    return {"return_logprob": True} if wanted else {}


def _completion_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(body.get("echo", False), bool):
        raise AskError(f"echo must be true or false, not {kind_of(body['echo'])}", "echo")
    if "logprobs" not in body:
        return {}
    wanted = {"return_logprob": True, "top_logprobs_num": body["logprobs"]}
    return wanted | ({"logprob_start_len": 0} if body.get("echo") else {})


_KINDS = {str: "a string", dict: "an object", bool: "true or false"}
