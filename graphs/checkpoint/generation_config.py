"""The types of what generation_config.json says, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.checkpoint.base import CheckpointError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_generation_config(value: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ``value`` if the token ids in it are ids; sampling values are checked where they are used, if they are.

    Raises:
        CheckpointError: naming the file and the field.
    """
    for name in TOKENS:
        ids = value.get(name)
        if ids is not None and not all(_is_id(one) for one in (ids if isinstance(ids, list) else [ids])):
            raise CheckpointError(
                f"{source}: {name} must be an id, a list of ids or null, not {ids!r:.80}; correct the file"
            )
    return dict(value)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
