"""Sampling values that a model's authors recommend: those of generation_config.json that vLLM uses too.

As in vLLM they stand in for what nobody asked for, ``do_sample`` does not count, and a ``SamplingParams`` that is
given stands for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.sampling import SamplingParams
from makeready.graphs.checkpoint.base import read_json

FILE = "generation_config.json"
FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
OFF = "generation_config=false"


def sampling_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling fields that ``generation_config.json`` sets, by our names, which are its own.

    Raises:
        RequestError: a value is of the wrong type or out of range.
    """
    made = {name: config[name] for name in FIELDS if config.get(name) is not None}
    try:
        SamplingParams.from_mapping(made)
    except RequestError as error:
        raise RequestError(f"{FILE}: {error}; correct it, or leave its values out with {OFF}") from None
    return made


def stated_defaults(checkpoint: str) -> dict[str, Any]:
    """The same of a checkpoint by its path, without opening the weights; {} where it states none.

    Raises:
        CheckpointError: the file is broken.
        RequestError: as above.
    """
    path = Path(checkpoint).expanduser() / FILE
    return sampling_defaults(read_json(path)) if path.is_file() else {}


def told(defaults: Mapping[str, Any]) -> str:
    """A sentence about them, for whoever wonders where values come from."""
    values = ", ".join(f"{name}={value}" for name, value in defaults.items())
    return f"sampling values of {FILE} are used where none are asked for: {values} ({OFF} leaves them out)"
