"""Rules of arguments that are written one by one, as bare text or as Python's values, of the types of a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.text.formats.cast import NULL, STRING, Tools
from makeready.engine.text.formats.rules import Tool
from makeready.engine.text.lark import ANY, Lark, containing

_OF_OBJECTS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_NOTES = {
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$id",
    "$comment",
    "deprecated",
    "readOnly",
}
_OF_TEXTS = {
    "type",
    "enum",
    "const",
    "minLength",
    "maxLength",
    "pattern",
    "anyOf",
    "oneOf",
    "$defs",
    "definitions",
}
_DEEPEST = 8  # references in one another


class Arguments:
    """The arguments of a tool.

    Attributes:
        names: in the order in which they come, and whether each has to.

    Raises:
        RequestError: its schema has what cannot be enforced where arguments are written so.
    """

    def __init__(self, tool: Tool, lark: Lark) -> None:
        self._tool, self._lark = tool, lark
        self._types = Tools([{"name": tool.name, "parameters": tool.arguments}])
        schema = self._resolved(tool.arguments)
        self._check("its arguments", schema, _OF_OBJECTS)
        properties, required = schema.get("properties", {}), schema.get("required", ())
        self._schemas = {**properties, **{name: {} for name in required if name not in properties}}
        self.names = {name: name in required for name in self._schemas}

    def types(self, name: str) -> frozenset[str]:
        """As the scanner has them."""
        return self._types.types(self._tool.name, name)

    def json(self, name: str) -> str:
        """An argument as JSON."""
        return self._lark.json(self._with_definitions(self._schemas[name]))

    def python(self, name: str) -> str:
        """An argument as Python writes it: JSON but for the words."""
        schema = self._resolved(self._schemas[name])
        if schema.keys() - _NOTES == {"type"} and schema["type"] in ("boolean", NULL):
            return '("True" | "False")' if schema["type"] == "boolean" else '"None"'
        return self.json(name)

    def text(self, name: str, end: str) -> str:
        """An argument as bare text, and what ends it; strings as they are, all else as JSON."""
        types = self.types(name)
        if types and STRING not in types:
            return f"{self.json(name)} {self._lark.text(end)}"
        return f"({' | '.join(self._texts(name, self._schemas[name], end, _DEEPEST))})"

    def _texts(self, name: str, schema: Any, end: str, deepest: int) -> list[str]:
        lark, schema = self._lark, self._resolved(schema)
        self._check(name, schema, _OF_TEXTS)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                if not deepest or schema.keys() & {"enum", "const", "minLength", "maxLength", "pattern"}:
                    self._refuse(name, key)
                return [each for one in schema[key] for each in self._texts(name, one, end, deepest - 1)]
        ending, stated = lark.text(end), schema.get("type", [STRING])
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if listed is not None:
            texts = [json.dumps(value) if value is None else value for value in listed]
            return [f"{lark.text(text)} {ending}" for text in texts if isinstance(text, str)]
        types = [stated] if isinstance(stated, str) else stated
        made = [f'"null" {ending}'] if NULL in types else []
        if STRING in types:
            marker = end.strip()
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            body = f"/(?s:.){{{least},{most}}}/" if least or most != "" else ANY
            if "pattern" in schema:
                body += " & " + _pattern(schema["pattern"])
            made.append(lark.up_to(end, body, (containing([marker]),)))
        return made

    def _resolved(self, schema: Any) -> Mapping[str, Any]:
        """A schema without the reference that it may be."""
        for _ in range(_DEEPEST):
            if not isinstance(schema, Mapping):
                return {}
            reference = schema.get("$ref")
            if reference is None:
                return schema
            target: Any = self._tool.arguments
            for step in str(reference).removeprefix("#/").split("/"):
                target = (
                    target.get(step.replace("~1", "/").replace("~0", "~"))
                    if isinstance(target, Mapping)
                    else None
                )
            schema = target
        self._refuse("an argument", "$ref")
        return {}

    def _with_definitions(self, schema: Any) -> Any:
        own = {
            key: self._tool.arguments[key] for key in ("$defs", "definitions") if key in self._tool.arguments
        }
        return {**own, **schema} if isinstance(schema, Mapping) else schema

    def _check(self, what: str, schema: Mapping[str, Any], known: set[str]) -> None:
        for key in schema:
            if key not in known | _NOTES and not key.startswith("x-"):
                self._refuse(what, key)

    def _refuse(self, what: str, key: str) -> None:
        raise RequestError(
            f"tools: {key} of {what} of {self._tool.name} cannot be enforced where arguments are no JSON; "
            "leave it out"
        )


def in_order(names: Mapping[str, bool], written: Sequence[str], lark: Lark, glue: str = "") -> str:
    """Arguments in order, of which those may be missing that need not come, with ``glue`` between two."""
    if not glue:
        return " ".join(
            one if must else f"({one})?" for one, must in zip(written, names.values(), strict=True)
        )
    behind = first = ""
    for one, must in reversed([*zip(written, names.values(), strict=True)]):
        begun = f"{one} {behind}"
        first = lark.rule(begun if must else f"{begun} | {first}" if first else f"({begun})?")
        behind = lark.rule(f"{glue} {one} {behind}" if must else f"({glue} {one})? {behind}")
    return first


def _pattern(pattern: str) -> str:
    """A pattern of JSON Schema, which may match anywhere, as one of the whole text."""
    body, begun, ended = pattern, "(?s:.)*", "(?s:.)*"
    if body.startswith("^"):
        body, begun = body[1:], ""
    if body.endswith("$") and not body.endswith("\\$"):
        body, ended = body[:-1], ""
    body = re.sub(r"(?<!\\)/", r"\\/", body).replace("\n", "\\n")
    return f"/{begun}({body}){ended}/"
