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
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from makeready.engine.text.messages import Parts, check_messages, forms
from makeready.engine.text.parts import TextError
from makeready.engine.text.sandbox import SANDBOX, BrokenTemplateError, LimitError

# Bytes of a template's file: the longest known are 30 kB, and what is larger is another file.
LARGEST = 1 << 20


def render_chat(
    template: str | Mapping[str, str] | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **kwargs: Any,
) -> str:
    """Render messages to a prompt; encode it with `add_special_tokens=False`, as it writes its own bos.

    Args:
        template: a jinja template; or several by name, of which `tool_use` is taken where there are
            tools, else `default`.
        messages: `{"role": ..., "content": ...}` each; content is a text, a list of text parts, or null
            where `tool_calls` stand in its place. `makeready.engine.text.messages` says in which forms
            templates get them.
        tools: JSON schemas of functions, for templates that know tools.
        add_generation_prompt: end with the opening of the assistant's answer.
        **kwargs: further variables of the template: the tokenizer's special tokens by name (`bos_token`),
            `enable_thinking`, `documents`, ...; those that are None are left undefined if their name
            ends in `_token`.

    Raises:
        TextError: no template, malformed messages, a broken template, or one that refuses the messages.
    """
    source = choose_template(template, tools)
    check_messages(messages)
    variables = {
        "tools": None if tools is None else list(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **{name: value for name, value in kwargs.items() if value is not None or not name.endswith("_token")},
    }
    return _rendered(source, {**variables, "messages": [dict(message) for message in messages]})


def render_forms(source: str, variables: Mapping[str, Any] | None) -> str:
    """Offer a template the messages in one form after the other until it takes one.

    Runs in the sandbox's process; without variables the template is compiled only.

    Raises:
        Exception: what the template raises on the last form, or jinja2's error where it is broken.
    """
    template = compile_template(source)
    if variables is None:
        return ""
    failure: Exception | None = None
    with_nulls: str | None = None
    for form in forms(variables["messages"]):
        try:
            text = template.render({**variables, "messages": form.messages})
        except _FAILURES as error:
            failure = error
            continue
        if form.misread:
            continue
        if form.nulls and "None" in text:  # perhaps a null that was printed; the form without nulls tells
            with_nulls = text
            continue
        if with_nulls is not None and _without_none(with_nulls) != _without_none(text):
            return with_nulls
        return text
    if with_nulls is not None:
        return with_nulls
    assert failure is not None, "the last form is of texts alone, which cannot be misread"
    raise failure


def is_template(text: str) -> bool:
    """Whether a text is a template, rather than the path or the name of one."""
    return "{" in text or "\n" in text


def read_template(given: str | Path, named: str | Mapping[str, str] | None = None) -> str:
    """A chat template that a user passes.

    Args:
        given: the template's text, the path of a file with it, or the name of one of the model's templates.
        named: the model's templates.

    Raises:
        TextError: there is no such file, it is no template, or the template is broken.
    """
    if isinstance(named, Mapping) and given in named:
        return named[str(given)]
    source = given if isinstance(given, str) and is_template(given) else _file(given)
    _rendered(source, None)
    return source


def _file(given: str | Path) -> str:
    path = Path(given).expanduser()
    try:
        if not path.is_file():
            raise TextError(
                f"chat_template={str(given)!r} is no file and no template's text; give the path of a jinja template"
            )
        if path.stat().st_size > LARGEST:
            raise TextError(f"chat_template={path} has more than {LARGEST:,} bytes; give a jinja template")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError(
            f"chat_template={str(given)!r} cannot be read ({error}); give a jinja template"
        ) from None


def _rendered(source: str, variables: Mapping[str, Any] | None) -> str:
    """The text of a template; without variables it is compiled only."""
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


# What a template may raise on a form of messages that it does not take.
_FAILURES = (
    *(jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError),
)
_REFUSALS = ("TemplateError", "UndefinedError", "SecurityError", "TemplateRuntimeError", "TemplateNotFound")


def _without_none(text: str) -> str:
    """What is left of a text if printed nulls, and spaces that were trimmed around them, do not count."""
    return "".join(text.replace("None", "").split())


def choose_template(
    template: str | Mapping[str, str] | None, tools: Sequence[Mapping[str, Any]] | None
) -> str:
    """The text of the template that messages are rendered by; arguments as for :func:`render_chat`.

    Raises:
        TextError: there is none.
    """
    if isinstance(template, Mapping):
        name = "tool_use" if tools is not None and "tool_use" in template else "default"
        if name not in template:
            raise TextError(
                f"the model has chat templates {sorted(template)} but no default; "
                "pass the name of one as chat_template"
            )
        return template[name]
    if not template:
        raise TextError(
            "the model has no chat template; pass one as chat_template (text or path), "
            "or a prompt in place of messages"
        )
    return template


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
    if isinstance(value, Parts):  # as good as printed: what is wanted is the JSON of a text
        value.note_print()
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
