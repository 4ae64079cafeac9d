"""Render a conversation to a prompt by the model's jinja chat template.

Templates are code from a model's folder: they run in jinja's immutable sandbox, with the filters and
functions that Hugging Face templates expect (transformers, "Writing a chat template"), in a process with
limits to time and memory (engine/text/sandbox.py).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from makeready.engine.text.parts import TextError
from makeready.engine.text.sandbox import SANDBOX, BrokenTemplateError, LimitError


def render_chat(
    template: str | Mapping[str, str] | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **kwargs: Any,
) -> str:
    """Render messages to a prompt; encode it with `add_special_tokens=False`, as it writes its own bos.

    Args:
        template: a jinja template; or several by name, of which `tool_use` is taken where there are
            tools, else `default`.
        messages: `{"role": ..., "content": ...}` each; content is a text, a list of parts, or null
            where `tool_calls` stand in its place.
        tools: JSON schemas of functions, for templates that know tools.
        add_generation_prompt: end with the opening of the assistant's answer.
        bos_token: text of the token that begins a sequence; left undefined if None.
        eos_token: text of the token that ends a sequence; left undefined if None.
        **kwargs: further variables of the template, such as `enable_thinking` or `documents`.

    Raises:
        TextError: no template, malformed messages, a broken template, or one that refuses the messages.
    """
    source = _choose(template, tools)
    _check_messages(messages)
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    variables = {
        "tools": None if tools is None else list(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **{name: token for name, token in tokens.items() if token is not None},
        **kwargs,
        "messages": list(messages),
    }
    try:
        return SANDBOX.render(source, variables)
    except LimitError as error:
        raise TextError(f"the chat template {error}") from None
    except BrokenTemplateError as error:
        if error.kind in ("TemplateSyntaxError", "TemplateAssertionError"):
            raise TextError(
                f"the chat template is broken at line {error.line} ({error}); pass another template"
            ) from None
        if error.kind in _REFUSALS:
            raise TextError(
                f"the chat template refuses the messages ({error}); change them as it asks"
            ) from None
        raise TextError(
            f"the chat template fails on these messages ({error.kind}: {error}); "
            "check each message's fields against the template"
        ) from None
    except TypeError as error:
        raise TextError(f"{error}; pass texts, numbers, lists and objects") from None
    except OSError as error:
        raise TextError(f"the chat template cannot be run ({error}); free memory or processes") from None


_REFUSALS = ("TemplateError", "UndefinedError", "SecurityError", "TemplateRuntimeError", "TemplateNotFound")


def _choose(template: str | Mapping[str, str] | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
    if isinstance(template, Mapping):
        name = "tool_use" if tools is not None and "tool_use" in template else "default"
        if name not in template:
            raise TextError(
                f"the model has chat templates {sorted(template)} but no default; pass one of them"
            )
        return template[name]
    if not template:
        raise TextError("the model has no chat template; pass one, or a prompt in place of messages")
    return template


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TextError('messages must be a non-empty list; write [{"role": "user", "content": "..."}]')
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TextError(f"message {place} must be an object with role and content, not {message!r}")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise TextError(f"message {place} needs a role: one of system, user, assistant or tool")
        content = message.get("content")
        if content is None:
            if not message.get("tool_calls"):
                raise TextError(f"message {place} needs content: a text or a list of parts")
        elif not isinstance(content, str) and not _is_parts(content):
            raise TextError(f"content of message {place} must be a text or a list of parts, not {content!r}")


def _is_parts(content: Any) -> bool:
    return isinstance(content, (list, tuple)) and all(isinstance(part, (str, Mapping)) for part in content)


class _Generation(Extension):
    """`{% generation %}`: training marks the assistant's tokens with it; here its body just renders."""

    tags = {"generation"}  # noqa: RUF012, jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@lru_cache(maxsize=64)
def compile_template(template: str) -> jinja2.Template:
    """A template under the filters and functions of Hugging Face's; raises jinja2.TemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter writes <, > and & as escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
