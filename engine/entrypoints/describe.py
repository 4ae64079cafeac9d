"""What ``--help`` says about options: read from the docstrings of the dataclasses that declare them."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from makeready.engine.docstrings import attributes_of

WIDTH = 100  # columns; help is often read in half a screen


def option_table(kind: Any, values: DictConfig) -> str:
    """Every option of a structured config: its name, its value in ``values`` and its meaning."""
    lines: list[str] = []
    meanings = describe(kind)
    for name in sorted(meanings, key=lambda name: "." in name):  # what every use needs comes first
        lines.append(f"  {name}={_value(values, name)}")
        lines += textwrap.wrap(meanings[name], WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def preset_table(kind: Any, conf: Path) -> str:
    """Every group of presets in ``conf`` that a structured config has a place for, and its choices."""
    groups = {
        f.name: sorted(p.stem for p in (conf / f.name).glob("*.yaml")) for f in dataclasses.fields(kind)
    }
    return "\n".join(f"  {name}={'|'.join(choices)}" for name, choices in groups.items() if choices)


def _value(values: DictConfig, name: str) -> str:
    if OmegaConf.is_missing(*_parent(values, name)):
        return "(must be given)"
    value = OmegaConf.select(values, name)
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _parent(values: DictConfig, name: str) -> tuple[Any, str]:
    folder, _, last = name.rpartition(".")
    return (OmegaConf.select(values, folder) if folder else values), last


def describe(kind: Any, prefix: str = "") -> dict[str, str]:
    """Meaning of every option of a structured config by its full name, from ``Attributes`` of docstrings."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        meanings |= attributes_of(base.__doc__ or "")
    hints = typing.get_type_hints(kind)
    found: dict[str, str] = {}
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= describe(hints[f.name], f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = meanings[f.name]
    return found


def literals(kind: Any) -> frozenset[str]:
    """Full names of the options whose values are taken as they stand."""
    return frozenset(name for name, f, _ in _leaves(kind) if f.metadata.get("literal"))


def text_lists(kind: Any) -> dict[str, bool]:
    """Full names of the options that are lists of texts, and whether these have escapes such as ``\\n``."""
    return {name: f.metadata["texts"] for name, f, _ in _leaves(kind) if "texts" in f.metadata}


def switches(kind: Any) -> frozenset[str]:
    """Full names of the options that are true or false."""
    return frozenset(name for name, _, hint in _leaves(kind) if hint is bool)


def mappings(kind: Any) -> frozenset[str]:
    """Full names of the options that map whatever names the user likes."""
    return frozenset(name for name, _, hint in _leaves(kind) if typing.get_origin(hint) is dict)


def _leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Full name, field and type of every option."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _leaves(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, hints[f.name]
