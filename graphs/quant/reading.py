"""Fields of a ``quantization_config``, read with their types; what does not fit is refused by its name."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from makeready.graphs.checkpoint.base import CheckpointWarning
from makeready.graphs.models.family import UnsupportedModelError


def refused_unless(holds: bool, reason: str) -> None:
    """Raise ``reason`` of a quantization_config that is not read.

    Raises:
        UnsupportedModelError: it does not hold.
    """
    if not holds:
        raise UnsupportedModelError(f"quantization_config: {reason}")


def expect(said: Mapping[str, Any], field: str, known: tuple[str, ...]) -> None:
    """Refuse a field that is there and holds something else than what is known."""
    value = said.get(field)
    refused_unless(
        value is None or (isinstance(value, str) and value in known),
        f"{field} {value!r} is not supported; use a checkpoint with {' or '.join(known)}",
    )


def integer(said: Mapping[str, Any], *names: str, usual: int | None = None) -> int:
    """The whole number that the first of these fields holds which is there."""
    value = next((said[name] for name in names if said.get(name) is not None), usual)
    refused_unless(
        type(value) is int, f"{names[0]} must be a whole number, not {value!r:.80}; correct config.json"
    )
    assert isinstance(value, int)
    return value


def flag(said: Mapping[str, Any], name: str, usual: bool) -> bool:
    """Whether a field says true."""
    value = said.get(name)
    value = usual if value is None else value
    refused_unless(
        type(value) is bool, f"{name} must be true or false, not {value!r:.80}; correct config.json"
    )
    return value


def names_of(said: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """The names that a list holds; none where it is not there."""
    value = said.get(field) or []
    sound = isinstance(value, list) and all(isinstance(item, str) for item in value)
    refused_unless(sound, f"{field} must be a list of names, not {value!r:.80}; correct config.json")
    return tuple(value)


def patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Names in which ``*``, ``?`` and ``[]`` may stand for parts, as lists of modules have them
    (:func:`makeready.graphs.quant.scheme.matches`).
    """
    wild = (name if name.startswith("re:") or not set("*?[") & set(name) else None for name in names)
    return tuple(
        own if own is not None else f"re:{fnmatch.translate(name)}"
        for name, own in zip(names, wild, strict=True)
    )


def tell_wide_activations(bits: int) -> None:
    """Warn, once a process, that activations which a config quantizes are not: weights alone have few bits here."""
    _tell(
        f"activations of {bits} bits are not computed here, they stay as wide as the plan has them (W4A16); scales "
        "of activations in the file are not read"
    )


def tell_cache() -> None:
    """Warn, once a process, that a config's dtype of the cache is not taken over."""
    _tell(
        "the cache has the dtype that kv.dtype says, whatever the file does; its scales of a cache are not read"
    )


def _tell(what: str) -> None:
    # From here, so that a process is told once.
    warnings.warn(f"quantization_config: {what}", CheckpointWarning, stacklevel=1)
