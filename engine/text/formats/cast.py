"""Texts to JSON of the type that a tool's schema states: for formats that write arguments without quotes.

One function for answers that stream and those that do not. A text that is nothing of the stated types stays a text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.text.formats.source import BLANK, Source, ended
from makeready.engine.text.formats.values import Write, escaped, number, read_value

STRING, NULL = "string", "null"
_NESTED = ("anyOf", "oneOf", "allOf")
_DEEPEST = 8  # schemas in one another that are looked through for a type
_OF_VALUE = {str: STRING, bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


class Tools:
    """The tools of a request.

    Args:
        tools: each ``{"type": "function", "function": {"name", "parameters"}}``, or what is under ``function`` alone.
    """

    def __init__(self, tools: Sequence[Any] = ()) -> None:
        self._schemas: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
            if isinstance(function, Mapping) and isinstance(function.get("parameters"), Mapping):
                self._schemas[str(function.get("name"))] = function["parameters"]

    def types(self, name: str, argument: str) -> frozenset[str]:
        """JSON's names of the types that an argument may have; none where nobody says."""
        schema = self._schemas.get(name, {})
        properties = schema.get("properties")
        found: set[str] = set()
        if isinstance(properties, Mapping):
            _types(properties.get(argument), schema, found, _DEEPEST)
        return frozenset(found)


def _types(schema: Any, root: Mapping[str, Any], found: set[str], deepest: int) -> None:
    if not isinstance(schema, Mapping) or not deepest:
        return
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, Mapping) else None
        _types(target, root, found, deepest - 1)
    stated = schema.get("type")
    named = stated if isinstance(stated, list) else [stated]
    found.update(name for name in named if isinstance(name, str))
    if stated is None:
        listed = schema.get("enum")
        values = [
            *(listed if isinstance(listed, list) else ()),
            *(schema[k] for k in ("const",) if k in schema),
        ]
        found.update(_OF_VALUE.get(type(value), NULL) for value in values)
    for key in _NESTED:
        for inner in schema[key] if isinstance(schema.get(key), list) else ():
            _types(inner, root, found, deepest - 1)


def cast(text: str, types: frozenset[str]) -> str:
    """The JSON of an argument that was written as bare text."""
    plain = text.strip(BLANK)
    word = plain.lower()
    if NULL in types and word in ("null", "none"):
        return "null"
    if "boolean" in types and word in ("true", "false"):
        return word
    if not types.isdisjoint(("integer", "number")) and (made := _number(plain, types)) is not None:
        return made
    for name, bracket in (("object", "{"), ("array", "[(")):
        if name in types and plain and plain[0] in bracket and (found := json_of(plain)) is not None:
            return found
    return json.dumps(text, ensure_ascii=False)


def fit(made: str, types: frozenset[str]) -> str:
    """The JSON of an argument that was written as a value, not always of the stated type."""
    if not types:
        return made
    if made.startswith('"'):
        return made if STRING in types else cast(json.loads(made), types)
    kinds = {"{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": NULL}
    kind = kinds.get(made[0], "number")
    if kind in types or (kind == "number" and "integer" in types):
        return _number(made, types) or made if kind == "number" else made
    return json.dumps(made, ensure_ascii=False) if STRING in types else made


class TextArgument:
    """An argument that comes as bare text between markers; a newline next to each marker is no part of it.

    A string is written as it comes; what may be anything else waits for its end.
    """

    def __init__(self, types: frozenset[str], write: Write) -> None:
        self._types, self._write = types, write
        self._streams = not types or STRING in types
        self._held: list[str] = []
        self._begun = False

    def add(self, text: str) -> None:
        """More of it."""
        self._held.append(text)
        if not self._streams:
            return
        text = "".join(self._held)
        if not self._begun:
            # It may be a null, or begin with the marker's newline.
            if text == "\n" or (NULL in self._types and "null".startswith(text.strip(BLANK).lower())):
                return
            text, self._begun = text.removeprefix("\n"), True
            self._write('"')
        shown = text.removesuffix("\n")
        self._held = [text[len(shown) :]]
        self._write(escaped(shown))

    def close(self) -> None:
        """It ends."""
        text = "".join(self._held)
        if self._begun:
            self._write('"')
            return
        text = text.removeprefix("\n").removesuffix("\n")
        only = self._types & {NULL} if self._streams else self._types
        self._write(cast(text, only))

    def cut(self) -> None:
        """The answer ends in it, so it stays as it stands."""
        if not self._begun:
            self._write("".join(self._held).strip(BLANK))


def _number(text: str, types: frozenset[str]) -> str | None:
    made = number(text)
    if made is None or not math.isfinite(value := float(made)):
        return None
    if "number" in types or made.lstrip("-").isdigit():
        return made
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else None


def json_of(text: str) -> str | None:
    """The JSON of a text that is one value."""
    source, parts = Source(), list[str]()
    source.put(text)
    source.end()
    whole = ended(read_value(source, parts.append)) and not ended(source.peek())
    return "".join(parts) if whole else None
