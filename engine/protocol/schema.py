"""What the bodies of requests may say, as JSON Schema, for ``/openapi.json``.

Sampling fields are described by :class:`makeready.engine.sampling.SamplingParams`, under each protocol's names.
Fields that are refused, or have no effect, are left out; a schema tells types, and what a request is told tells the
rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from makeready.engine.docstrings import attributes_of
from makeready.engine.sampling import SamplingParams

Schema = Mapping[str, Any]

STRING, BOOLEAN, INTEGER = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
OBJECT, IDS = {"type": "object"}, {"type": "array", "items": INTEGER}
CONTENT = {"anyOf": [STRING, {"type": "array", "items": OBJECT}, {"type": "null"}]}
MESSAGES = {
    "type": "array",
    "items": {"type": "object", "properties": {"role": STRING, "content": CONTENT}, "required": ["role"]},
}
PROMPT = {"anyOf": [STRING, {"type": "array", "items": STRING}, IDS, {"type": "array", "items": IDS}]}
_FUNCTION = {
    "type": "object",
    "properties": {"name": STRING, "description": STRING, "parameters": OBJECT, "strict": BOOLEAN},
    "required": ["name"],
}
# Fields that mean the same in all protocols that have them.
SHARED: Mapping[str, Schema] = {
    "model": {**STRING, "description": "The model's name; left out, the one that is served."},
    "messages": MESSAGES,
    "prompt": PROMPT,
    "stream": {**BOOLEAN, "description": "Answer piece by piece."},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": BOOLEAN, "continuous_usage_stats": BOOLEAN},
    },
    "tools": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _FUNCTION},
            "required": ["function"],
        },
    },
    "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required"]}, OBJECT]},
    "parallel_tool_calls": BOOLEAN,
    "response_format": {
        "type": "object",
        "properties": {"type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]}},
        "required": ["type"],
    },
    "structured_outputs": OBJECT,
    "reasoning_effort": STRING,
    "chat_template": {**STRING, "description": "A template's text in place of the model's."},
    "chat_template_kwargs": {**OBJECT, "description": "Variables of the chat template."},
    "add_special_tokens": BOOLEAN,
    "echo": BOOLEAN,
    "priority": {**INTEGER, "description": "Where the policy is priority: the least runs first."},
    "extra_key": {**STRING, "description": "Prefixes are shared among requests of one key only."},
    "system": CONTENT,
    "raw": BOOLEAN,
}


def body_schema(
    names: Iterable[str],
    sampling: Mapping[str, str] | None = None,
    required: Iterable[str] = (),
    **own: Schema,
) -> dict[str, Any]:
    """The schema of a body.

    Args:
        names: of its fields.
        sampling: those that are a sampling field of ours, by its name.
        own: those that mean something else than in other protocols.
    """
    meaning, table = sampling_schemas(), sampling or {}
    fields = {
        name: own.get(name) or meaning.get(table.get(name, name)) or SHARED.get(name, {})
        for name in (*names, *table, *own)
    }
    return {"type": "object", "properties": fields, "required": sorted(required)}


@cache
def sampling_schemas() -> dict[str, Any]:
    """The schema of every sampling field, by name."""
    import msgspec  # which only servers have

    made = msgspec.json.schema(SamplingParams)["$defs"][SamplingParams.__name__]["properties"]
    said = attributes_of(SamplingParams.__doc__ or "")
    return {
        name: {**{key: value for key, value in each.items() if key != "default"}, "description": said[name]}
        for name, each in made.items()
    }
