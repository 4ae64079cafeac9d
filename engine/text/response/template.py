"""A response template, checked: which texts open and close which fields of a message.

Unlike in transformers nothing is done silently: a template that cannot be followed is refused, and whoever loads the
checkpoint is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.text.parts import TextError
from makeready.engine.text.response.contents import TEXTS, check_content, check_transform
from makeready.engine.text.response.pattern import Pattern, Search

CONTENT, CALLS, ROLE = "content", "tool_calls", "role"
REASONING = ("thinking", "reasoning_content", "reasoning")  # what templates call it
_FIELD = {
    *("open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join"),
    *("optional", "transform", "transform_each"),
}
_TOP = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}


@dataclass(frozen=True)
class Field:
    """A field of a message.

    Attributes:
        name: what messages call it.
        opening: where it begins; None for the one that holds what is in no other.
        closing: where it ends; None: with the answer, or where another one begins.
        literals: the texts of both, where they are no patterns and there is one of each; else "".
        content, arguments: the parser of what it holds, and its options.
        strip: white space around it is dropped.
        join: what stands between its parts.
        transform, each: how its value, or each value of a list, is written.
    """

    name: str
    opening: Pattern | None
    closing: Pattern | None
    literals: tuple[str, str]
    content: str = "text"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    strip: bool = True
    join: str = ""
    transform: Any = None
    each: bool = False


@dataclass(frozen=True)
class ResponseTemplate:
    """How answers are written.

    Attributes:
        fields: by name.
        rest: the field that holds what is in no other; None where there is none.
        anchor: behind whose last match in a prompt the answer begins.
    """

    fields: Mapping[str, Field]
    rest: Field | None
    anchor: Pattern

    def reasoning(self) -> Field | None:
        """The field of reasoning; None where there is none."""
        return next((self.fields[name] for name in REASONING if name in self.fields), None)

    def opened(self, prompt: str) -> str:
        """What of an answer a prompt has written already; "" where none begins in it."""
        found = self.anchor.last(prompt)
        return "" if found is None else prompt[found.end :]


def read_response_template(spec: Any) -> ResponseTemplate:
    """Check a template as tokenizer_config.json has it.

    Raises:
        TextError: naming what cannot be followed.
    """
    if not isinstance(spec, Mapping):
        raise TextError("it must be an object")
    if spec.get("version", 1) != 1:
        raise TextError(f"its version is {spec['version']!r}, and 1 is known")
    if unknown := spec.keys() - _TOP:
        raise TextError(f"{min(unknown)!r} is no key of it")
    said = spec.get("fields")
    if (
        not isinstance(said, Mapping)
        or not said
        or not all(isinstance(each, Mapping) for each in said.values())
    ):
        raise TextError("fields must be an object of objects")
    fields = {name: _field(name, each) for name, each in said.items()}
    rest = [each for each in fields.values() if each.opening is None]
    if len(rest) > 1:
        raise TextError(f"{rest[0].name} and {rest[1].name} both have no open, and one field may")
    anchor, _ = _delimiter("it", spec, "start_anchor")
    if anchor is None:
        raise TextError("it must have start_anchor or start_anchor_pattern")
    return ResponseTemplate(fields, rest[0] if rest else None, anchor)


def _field(name: str, said: Mapping[str, Any]) -> Field:
    if unknown := said.keys() - _FIELD:
        raise TextError(f"{min(unknown)!r} is no key of field {name}")
    content, arguments = said.get("content", "text"), said.get("content_args", {})
    check_content(content, arguments, name)
    join, transform, each = said.get("join"), said.get("transform"), said.get("transform_each", False)
    if join is not None and not (isinstance(join, str) and said.get("repeats")):
        raise TextError(f"join of {name} must be a text, and needs repeats")
    if not isinstance(each, bool) or (each and transform is None):
        raise TextError(f"transform_each of {name} must be true or false, and needs transform")
    check_transform(transform, name)
    if name != CALLS and (transform is not None or content not in TEXTS):
        raise TextError(f"{name} is no text, and only tool_calls may be something else")
    opening, first = _delimiter(name, said, "open")
    closing, last = _delimiter(name, said, "close")
    strip = bool(arguments.get("strip", True))
    return Field(
        name, opening, closing, (first, last), content, dict(arguments), strip,
        ("\n" if strip else "") if join is None else join, transform, each,
    )  # fmt: skip


def _delimiter(where: str, said: Mapping[str, Any], key: str) -> tuple[Pattern | None, str]:
    """A text, one of several, or a pattern; and the text, where there is one alone."""
    literal, pattern = said.get(key), said.get(f"{key}_pattern")
    if literal is None and pattern is None:
        return None, ""
    if literal is not None and pattern is not None:
        raise TextError(f"{where} has both {key} and {key}_pattern")
    if pattern is not None:
        if not isinstance(pattern, str):
            raise TextError(f"{key}_pattern of {where} must be a text")
        made = Pattern(pattern)
        search = Search(made, 1)
        search.end()
        if key != "close" and search.found is not None:
            raise TextError(f"{key}_pattern of {where} matches the empty text")
        return made, ""
    texts = [literal] if isinstance(literal, str) else literal
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) and each for each in texts):
        raise TextError(f"{key} of {where} must be a text or a list of texts")
    longest = sorted(dict.fromkeys(texts), key=len, reverse=True)
    return Pattern("|".join(map(re.escape, longest))), texts[0] if len(texts) == 1 else ""
