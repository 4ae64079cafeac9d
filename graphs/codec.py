"""Frozen dataclasses to JSON values and back, strictly: an unknown or a missing field is an error."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")


class CodecError(ValueError):
    """The JSON does not describe a value of the type; the message names the path of the field."""


def canonical(value: Any) -> bytes:
    """JSON bytes that depend on the value alone: sorted keys, one separator, no NaN, a final newline."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode() + b"\n"


def to_json(value: Any) -> Any:
    """``value`` as JSON data; dataclass fields that hold their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = {}
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if item != _default(f):
                made[f.name] = to_json(item)
        return made
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(kind: type[T], data: Any, path: str = "") -> T:
    """The value of dataclass ``kind`` that :func:`to_json` turned into ``data``.

    Raises:
        CodecError: ``data`` has another shape.
    """
    return _read(kind, data, path)


def _default(f: dataclasses.Field) -> Any:
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else dataclasses.MISSING


@lru_cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(kind)
    return {f.name: (hints[f.name], _default(f) is dataclasses.MISSING) for f in dataclasses.fields(kind)}


def _read(kind: Any, data: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), data, path)
    if origin in (typing.Union, types.UnionType):
        return _read_union(typing.get_args(kind), data, path)
    if origin is tuple:
        _expect(isinstance(data, list), path, "a list", data)
        item, *rest = typing.get_args(kind)
        kinds = [item] * len(data) if rest == [...] else [item, *rest]
        _expect(len(kinds) == len(data), path, f"{len(kinds)} entries", data)
        return tuple(_read(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, data, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        _expect(isinstance(data, dict), path, "an object", data)
        key, item = typing.get_args(kind)
        return {_read_key(key, k, path): _read(item, v, f"{path}.{k}") for k, v in data.items()}
    if kind is float:
        _expect(isinstance(data, int | float) and not isinstance(data, bool), path, "a number", data)
        return float(data)
    if kind is type(None):
        _expect(data is None, path, "null", data)
        return None
    _expect(type(data) is kind, path, kind.__name__, data)
    return data


def _read_dataclass(kind: type, data: Any, path: str) -> Any:
    _expect(isinstance(data, dict), path, "an object", data)
    fields = _fields(kind)
    for name in data:
        if name not in fields:
            raise CodecError(f"{path or kind.__name__} has an unknown field {name!r}")
    made = {}
    for name, (hint, required) in fields.items():
        if name in data:
            made[name] = _read(hint, data[name], f"{path}.{name}" if path else name)
        elif required:
            raise CodecError(f"{path or kind.__name__} lacks the field {name!r}")
    try:
        return kind(**made)
    except ValueError as error:  # the type's own checks
        raise CodecError(f"{path or kind.__name__}: {error}") from None


def _read_key(kind: type, data: str, path: str) -> Any:
    try:
        return kind(data)
    except ValueError:
        raise CodecError(f"{path}.{data} must be {kind.__name__}, not {data!r}") from None


def _read_union(kinds: tuple[Any, ...], data: Any, path: str) -> Any:
    for kind in kinds:
        try:
            return _read(kind, data, path)
        except CodecError:
            continue
    raise CodecError(f"{path} is {data!r}, which is none of {', '.join(map(str, kinds))}")


def _expect(holds: bool, path: str, wanted: str, data: Any) -> None:
    if not holds:
        raise CodecError(f"{path or 'the value'} must be {wanted}, not {type(data).__name__}")
