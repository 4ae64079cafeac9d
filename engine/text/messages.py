"""Messages in the forms that chat templates take them in.

Some fields come in more than one form, and templates differ in which they take:

- content as a list of text parts, or as one text;
- arguments of a tool call as an object (what transformers documents), or as JSON text (what OpenAI's API
  writes, and what DeepSeek's template joins to its text);
- content null beside tool calls (what OpenAI's API writes, and what some templates ask for), or an empty text;
- reasoning beside content and calls, which gpt-oss's template refuses.

Reasoning comes as ``reasoning_content`` or ``reasoning``; templates get it under all names that they have for it.

A template says which it takes by what it does: one that takes the other form raises, or writes the object as
Python prints it, or never reads the text. So messages are offered in one form after the other until one is
taken; the form nearest to what transformers would pass goes first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.text.parts import TextError

# Between the parts of a content that a template takes as one text; as vLLM and llama.cpp join them.
PART_SEPARATOR = "\n"
# What clients call reasoning, and what else templates do.
REASONING, THINKING = ("reasoning_content", "reasoning"), "thinking"


@dataclass
class Form:
    """Messages in one form.

    Attributes:
        messages: for the template.
        nulls: whether a null content is among them.
    """

    messages: list[dict[str, Any]]
    nulls: bool = False
    _seen: _Seen = field(default_factory=lambda: _Seen())

    @property
    def misread(self) -> bool:
        """Whether the template, which was rendered, takes another form."""
        return self._seen.printed or any(not item.was_read for item in self._seen.items)


def forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[Form]:
    """The forms of messages, beginning with lists, objects and nulls and ending with texts alone.

    Raises:
        TextError: malformed messages, a content part that is no text, or arguments that are no JSON object.
    """
    read = [_read(place, message) for place, message in enumerate(_checked(messages))]
    aspects = [
        any(isinstance(message.get("content"), list) for message in read),
        any("arguments" in call for message in read for call in _functions(message)),
        any(message.get("content") is None for message in read),
        any(message.get("content") and message.get("tool_calls") and THINKING in message for message in read),
    ]
    choices = itertools.product(*((False, True) if present else (False,) for present in aspects))
    # Few changes first; a null goes last, since some templates look for calls only beside one.
    for as_text, as_json, as_empty, without in sorted(choices, key=lambda c: (c[3], sum(c), c[2], c[0])):
        form = Form([], nulls=aspects[2] and not as_empty)
        form.messages = [_formed(message, form._seen, as_text, as_json, as_empty) for message in read]
        if without:
            form.messages = [
                {name: value for name, value in message.items() if name != THINKING}
                for message in form.messages
            ]
        yield form


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what no form could mend.

    Raises:
        TextError: malformed messages, a content part that is no text, or arguments that are no JSON object.
    """
    for place, message in enumerate(_checked(messages)):
        _read(place, message)


class _Seen:
    """What a template did with the objects of a form."""

    def __init__(self) -> None:
        self.printed = False
        self.items: list[_Object] = []


class Printable:
    """Something that no template means to print as Python prints it."""

    seen_by: _Seen

    def note_print(self) -> None:
        """It was turned into text."""
        self.seen_by.printed = True

    def __str__(self) -> str:
        self.note_print()
        return super().__str__()

    def __repr__(self) -> str:
        self.note_print()
        return super().__repr__()

    def __format__(self, spec: str) -> str:
        self.note_print()
        return super().__str__()


class Parts(Printable, list[Any]):
    """Content as a list of parts."""


class _Object(Printable, dict[str, Any]):
    """An object that remembers whether what it holds was read; ``names`` alone count, if there are any."""

    was_read = False
    names: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Any:
        self.was_read = self.was_read or not self.names or name in self.names
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def __iter__(self) -> Iterator[str]:
        self.was_read = True
        return super().__iter__()

    def items(self) -> Any:  # what JSON is written from
        self.was_read = True
        return super().items()

    def keys(self) -> Any:
        self.was_read = True
        return super().keys()

    def values(self) -> Any:
        self.was_read = True
        return super().values()


class _Part(_Object):
    """A text part."""

    names = frozenset({"text"})


class _Arguments(_Object):
    """Arguments of a tool call as an object."""


def _checked(messages: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise TextError('messages must be a non-empty list; write [{"role": "user", "content": "..."}]')
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TextError(f"message {place} must be an object with role and content, not {message!r}")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise TextError(f"message {place} needs a role: one of system, user, assistant or tool")
        thought = any(message.get(name) is not None for name in REASONING)
        if message.get("content") is None and not message.get("tool_calls") and not thought:
            raise TextError(f"message {place} needs content: a text or a list of parts")
    return messages


def _read(place: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of its own whose parts are a list of texts and whose arguments are objects."""
    made = dict(message)
    content = made.get("content")
    if isinstance(content, (list, tuple)):
        made["content"] = [_part_text(place, part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise TextError(f"content of message {place} must be a text or a list of parts, not {content!r}")
    elif content is None:
        made["content"] = None  # left out means the same
    thought = next((made[name] for name in REASONING if made.get(name) is not None), None)
    if thought is not None:
        if not isinstance(thought, str):
            raise TextError(f"reasoning of message {place} must be a text, not {thought!r}")
        made = {**dict.fromkeys((*REASONING, THINKING), thought), **made, REASONING[0]: thought}
    calls = made.get("tool_calls")
    if isinstance(calls, (list, tuple)):
        made["tool_calls"] = [
            _read_call(place, call) if isinstance(call, Mapping) else call for call in calls
        ]
    return made


def _part_text(place: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise TextError(f"content of message {place} must be a text or a list of parts, not {[part]!r}")
    kind = part.get("type", "text")
    if kind != "text":
        raise TextError(
            f"content of message {place} has a part of type {kind!r}, and the model reads text alone; leave it out"
        )
    if not isinstance(part.get("text"), str):
        raise TextError(
            f'content of message {place} has a part without text; write {{"type": "text", "text": "..."}}'
        )
    return part["text"]


def _read_call(place: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are ``(object, JSON text)``."""
    made = dict(call)
    inner = made.get("function")
    function: dict[str, Any] = made if not isinstance(inner, Mapping) else dict(inner)
    if function is not made:
        made["function"] = function
    given = function.get("arguments")
    if isinstance(given, str):
        try:
            value = json.loads(given) if given.strip() else {}
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise TextError(
                f"arguments of a tool call in message {place} are no JSON object ({given[:80]!r}); correct them"
            )
        function["arguments"] = (value, given)
    elif isinstance(given, Mapping):
        function["arguments"] = (dict(given), json.dumps(given, ensure_ascii=False, default=str))
    return made


def _functions(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Where the arguments of a message's tool calls stand."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            yield call["function"] if isinstance(call.get("function"), dict) else call


def _formed(
    message: dict[str, Any], seen: _Seen, as_text: bool, as_json: bool, as_empty: bool
) -> dict[str, Any]:
    made = dict(message)
    content = made.get("content")
    if isinstance(content, list):
        made["content"] = PART_SEPARATOR.join(content) if as_text else _parts(content, seen)
    elif content is None and as_empty:
        made["content"] = ""
    if isinstance(made.get("tool_calls"), list):
        made["tool_calls"] = [
            {**call, "function": dict(call["function"])}
            if isinstance(call, dict) and isinstance(call.get("function"), dict)
            else dict(call)
            if isinstance(call, dict)
            else call
            for call in made["tool_calls"]
        ]
        for function in _functions(made):
            if isinstance(function.get("arguments"), tuple):
                value, text = function["arguments"]
                function["arguments"] = text if as_json else _watched(_Arguments(value), seen)
    return made


def _parts(texts: Sequence[str], seen: _Seen) -> Parts:
    return _watched(Parts(_watched(_Part(type="text", text=text), seen) for text in texts), seen)


def _watched(value: Any, seen: _Seen) -> Any:
    value.seen_by = seen
    if isinstance(value, _Object) and value:  # nobody has to read an empty one
        seen.items.append(value)
    return value
