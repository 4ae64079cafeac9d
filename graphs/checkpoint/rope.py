"""Rotary embedding settings in one normal form.

Spellings: `rope_theta` with `rope_scaling` (transformers 4; `type` or `rope_type`), or `rope_parameters`
(transformers 5; holds `rope_theta` too and may be nested by layer type).
"""

from __future__ import annotations

import math
from typing import Any

from makeready.graphs.checkpoint.base import CheckpointError

DEFAULT_THETA = 10000.0

# Per type: the numbers it needs and those it may have. Names and meaning are transformers'.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_MAY: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
ROPE_TYPES = tuple(_NEEDS)

# Written by tools but read by no implementation of the types above; dropping them changes nothing.
_UNUSED = {"type", "rope_type", "rope_theta", "finetuned"}
_UNUSED_BY_TYPE = {kind: {"original_max_position_embeddings"} for kind in ("default", "linear", "dynamic")}


def normalise_rope(config: dict[str, Any], source: str, *, partial: float = 1.0) -> dict[str, Any]:
    """Return the rotary settings of a config.

    Args:
        config: a Hugging Face config in either spelling, with `max_position_embeddings` checked.
        source: what to call it in errors.
        partial: the part of a head's features that is rotated where nothing is said; a family with another one than
            1 takes what the config says, others refuse it.

    Returns:
        `{"rope_type": one of ROPE_TYPES, "rope_theta": float, ...}` with exactly the fields of that type:
        `factor`; for llama3 `low_freq_factor`, `high_freq_factor`; for llama3 and yarn
        `original_max_position_embeddings`; for yarn, where stated, `attention_factor`, `beta_fast`,
        `beta_slow`, `mscale`, `mscale_all_dim`, `truncate`; `partial_rotary_factor` where it is not 1.

    Raises:
        CheckpointError: an unsupported type, a missing or unknown field, or contradicting spellings.
    """
    stated = [
        _flatten(config[field], field, source)
        for field in ("rope_parameters", "rope_scaling")
        if config.get(field) is not None
    ]
    readings = [_normalise(values, config, source, partial) for values in stated or [{}]]
    if any(reading != readings[0] for reading in readings):
        raise CheckpointError(f"{source}: rope_parameters and rope_scaling contradict each other; keep one")
    return readings[0]


def _flatten(value: Any, field: str, source: str) -> dict[str, Any]:
    """Return one dict of settings; per-layer-type settings only if they are all the same."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: {field} must be an object, not {value!r}; correct the config")
    nested = [item for item in value.values() if isinstance(item, dict)]
    if not nested:
        return value
    if len(nested) != len(value) or any(item != nested[0] for item in nested):
        raise CheckpointError(
            f"{source}: {field} differs between layer types ({', '.join(value)}), which is not supported; "
            "use a model with one rotary embedding"
        )
    return nested[0]


def _normalise(
    values: dict[str, Any], config: dict[str, Any], source: str, partial: float = 1.0
) -> dict[str, Any]:
    values = {key: value for key, value in values.items() if value is not None}
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _NEEDS:
        raise CheckpointError(
            f"{source}: rope_type {kind!r} is not supported; use a model with one of {', '.join(ROPE_TYPES)}"
        )
    for holder in (values, config) if partial == 1.0 else ():
        if holder.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                f"{source}: partial_rotary_factor {holder['partial_rotary_factor']!r} is not supported; "
                "use a model that rotates whole heads (1.0)"
            )
    known = {
        *_NEEDS[kind],
        *_MAY.get(kind, ()),
        *_UNUSED,
        *_UNUSED_BY_TYPE.get(kind, ()),
        "partial_rotary_factor",
    }
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckpointError(
            f"{source}: rope_type {kind!r} does not take {', '.join(unknown)}; remove it or correct rope_type"
        )
    if kind in ("llama3", "yarn"):
        _fill_original_length(values, kind, config)
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": _theta(values, config, source)}
    for field in _NEEDS[kind]:
        if field not in values:
            raise CheckpointError(f"{source}: rope_type {kind!r} needs {field}; add it to the rope settings")
        rope[field] = _number(values[field], field, source)
    for field in _MAY.get(kind, ()):
        if field in values:
            rope[field] = values[field] if field == "truncate" else _number(values[field], field, source)
    _check(rope, source)
    if partial != 1.0:
        rotated = _partial(values, config, source, partial)
        if rotated != 1.0:
            rope["partial_rotary_factor"] = rotated
    return rope


def _partial(values: dict[str, Any], config: dict[str, Any], source: str, usual: float) -> float:
    """The part of a head that is rotated, an even number of its features.

    What the rotary settings say comes before what the config says beside them, as in transformers, which writes its
    default there.
    """
    field = "partial_rotary_factor"
    stated = [h[field] for h in (values, config) if h.get(field) is not None]
    rotated = float(_number(stated[0], field, source)) if stated else usual
    features = int(config["head_dim"] * rotated)
    if rotated > 1 or features < 2 or features % 2:
        raise CheckpointError(
            f"{source}: {field} {rotated} rotates {features} of {config['head_dim']} features; it must be an even "
            "number of them"
        )
    return rotated


def _fill_original_length(values: dict[str, Any], kind: str, config: dict[str, Any]) -> None:
    """Take the length before scaling, and a yarn factor left out, from where transformers takes them."""
    outer = config.get("original_max_position_embeddings")
    if outer is not None:
        values["original_max_position_embeddings"] = outer
    length = config["max_position_embeddings"]
    original = values.setdefault("original_max_position_embeddings", length)
    if kind == "yarn" and "factor" not in values and type(original) is int and original > 0:
        values["factor"] = length / original


def _theta(values: dict[str, Any], config: dict[str, Any], source: str) -> float:
    stated = [holder["rope_theta"] for holder in (values, config) if holder.get("rope_theta") is not None]
    found = {float(_number(value, "rope_theta", source)) for value in stated} or {DEFAULT_THETA}
    if len(found) > 1:
        raise CheckpointError(f"{source}: rope_theta is stated twice with different values; keep one")
    return found.pop()


def _number(value: Any, field: str, source: str) -> int | float:
    """Check a positive number; lengths stay integers, everything else becomes a float."""
    is_length = field == "original_max_position_embeddings"
    allowed = type(value) is int or (type(value) is float and (not is_length or value.is_integer()))
    if not allowed or not 0 < value < math.inf:
        wanted = "a positive integer" if is_length else "a positive number"
        raise CheckpointError(f"{source}: {field} must be {wanted}, not {value!r}; correct the rope settings")
    if is_length and value >= 2**31:
        raise CheckpointError(f"{source}: {field} {value} must be below 2**31; correct the rope settings")
    return int(value) if is_length else float(value)


def _check(rope: dict[str, Any], source: str) -> None:
    if rope["rope_type"] == "yarn" and rope["rope_theta"] <= 1:
        raise CheckpointError(
            f"{source}: rope_theta must be above 1 for yarn, not {rope['rope_theta']}; correct it"
        )
    if rope.get("factor", 1.0) < 1:
        raise CheckpointError(f"{source}: rope factor must be at least 1, not {rope['factor']}; correct it")
    if not isinstance(rope.get("truncate", True), bool):
        raise CheckpointError(
            f"{source}: truncate must be true or false, not {rope['truncate']!r}; correct it"
        )
    if rope.get("low_freq_factor", 0) >= rope.get("high_freq_factor", 1):
        raise CheckpointError(
            f"{source}: low_freq_factor must be below high_freq_factor; correct the rope settings"
        )
    if rope.get("beta_slow", 1) > rope.get("beta_fast", 32):
        raise CheckpointError(f"{source}: beta_slow must not exceed beta_fast; correct the rope settings")


def normalise_rope_by_kind(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the rotary settings of each kind of layer, as :func:`normalise_rope` gives them.

    Args:
        config: its `rope_parameters` are settings by kind of layer; it has no others.
        source: what to call it in errors.
    """
    return {
        kind: normalise_rope({**config, "rope_parameters": values}, source)
        for kind, values in config["rope_parameters"].items()
    }
