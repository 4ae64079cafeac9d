"""Fields of a body that say what the output has to follow, as OpenAI, SGLang and vLLM spell them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from makeready.engine.protocol.asked import AskError, kind_of
from makeready.engine.sampling import GRAMMARS

_OBJECT = {"type": "object"}
# As Python's json writes it; half of its tokens are sure to come.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Of vLLM's `structured_outputs`, and of its older fields, which begin with `guided_`.
_GUIDED = {
    f"guided_{name}": ours
    for name, ours in (
        ("json", "json_schema"),
        ("regex", "regex"),
        ("choice", "choice"),
        ("grammar", "grammar"),
    )
}
_VLLM = {name.removeprefix("guided_"): ours for name, ours in _GUIDED.items()} | {
    "structural_tag": "structural_tag"
}

FIELDS = ("response_format", "structured_outputs", *_GUIDED, *GRAMMARS)


def grammar_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling field that a body's fields come to, if there is any.

    Raises:
        AskError: one is of an unknown form, or two are given.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in FIELDS:
        if body.get(name) is None:
            continue
        if name == "response_format":
            made = _response_format(body[name])
        elif name == "structured_outputs":
            made = _structured_outputs(body[name])
        else:
            made = _one(_GUIDED.get(name, name), body[name])
        if made:
            found[name] = made
    if len(found) > 1:
        first, second, *_ = found
        raise AskError(f"{first} and {second} cannot both hold; give one of them", second)
    return next(iter(found.values()), {})


def _response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": _OBJECT}
    if kind == "json_schema":
        named = value.get("json_schema")
        if isinstance(named, Mapping) and isinstance(named.get("schema"), Mapping | bool):
            return {"json_schema": named["schema"]}
        raise AskError("response_format.json_schema must have a schema, an object", "response_format")
    if kind == "structural_tag":
        return {"structural_tag": value}
    raise AskError(
        "response_format must be an object whose type is text, json_object, json_schema or structural_tag",
        "response_format",
    )


def _structured_outputs(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise AskError(f"structured_outputs must be an object, not {kind_of(value)}", "structured_outputs")
    given = {name: item for name, item in value.items() if item is not None}
    tight = given.pop("disable_any_whitespace", False)
    if not isinstance(tight, bool):
        raise AskError(
            "structured_outputs.disable_any_whitespace must be true or false", "structured_outputs"
        )
    if given == {"json_object": True}:
        given = {"json": _OBJECT}
    if tight and "json" in given:
        given["json"] = _one_line(given["json"])
    if len(given) != 1 or not given.keys() <= _VLLM.keys():
        raise AskError(
            f"structured_outputs must have one of {', '.join(_VLLM)} and json_object: true",
            "structured_outputs",
        )
    ((name, item),) = given.items()
    return _one(_VLLM[name], item)


def _one_line(schema: Any) -> Any:
    """A schema of JSON with a space behind each comma and colon, and no other."""
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        return schema  # is refused where all schemas are looked at
    return {**schema, "x-guidance": ONE_LINE} if isinstance(schema, Mapping) else schema


def _one(name: str, value: Any) -> dict[str, Any]:
    """vLLM takes two kinds of grammar in one field; in GBNF every rule has ``::=``."""
    if name == "grammar":
        name = "ebnf" if isinstance(value, str) and "::=" in value else "lark"
    return {name: value}
