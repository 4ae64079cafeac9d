"""From a checkpoint's config to a model: which architectures there are and how each reads its config.

A family is a module of this folder that calls :func:`family` on a function from a normalised config
(graphs/checkpoint/config.py) to a model config. Modules are found by themselves.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from makeready.graphs import models
from makeready.graphs.models.decoder import Decoder, DecoderConfig

ReadConfig: TypeAlias = Callable[[Mapping[str, Any]], DecoderConfig]

_FAMILIES: dict[str, ReadConfig] = {}


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something that no model here computes."""


def family(*architectures: str) -> Callable[[ReadConfig], ReadConfig]:
    """Register the decorated function as the reader of these ``architectures`` of ``config.json``."""

    def register(read: ReadConfig) -> ReadConfig:
        for name in architectures:
            _FAMILIES[name] = read
        return read

    return register


def architectures() -> dict[str, ReadConfig]:
    """Every supported architecture, by name."""
    for module in pkgutil.iter_modules(models.__path__):
        importlib.import_module(f"{models.__name__}.{module.name}")
    return dict(sorted(_FAMILIES.items()))


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The model config of a normalised checkpoint config.

    Raises:
        UnsupportedModelError: unknown architecture or activation function.
    """
    known = architectures()
    named = config.get("architectures") or ["(none)"]
    read = next((known[name] for name in named if name in known), None)
    if read is None:
        raise UnsupportedModelError(
            f"architecture {', '.join(named)} is not supported; supported are {', '.join(known)}"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported; dense decoders use 'silu'")
    return read(config)


def build(config: Mapping[str, Any], *, context_len: int, activation: str) -> Decoder:
    """The model that ``config`` describes, on the meta device."""
    return Decoder(read_config(config), context_len=context_len, activation=activation)


def dense(config: Mapping[str, Any], **overrides: Any) -> DecoderConfig:
    """The part that dense decoders read alike; ``overrides`` is what a family knows better."""
    rope = dict(config["rope_parameters"])
    if rope["rope_type"] == "dynamic":  # its scale starts where the config's context ends
        rope["original_max_position_embeddings"] = config["max_position_embeddings"]
    elif rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    layers = config["num_hidden_layers"]
    fields: dict[str, Any] = {
        "layers": layers,
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "vocabulary": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "context_len": config["max_position_embeddings"],
        "rope": rope,
        "windows": (0,) * layers,
        "tied_embeddings": config["tie_word_embeddings"],
    }
    return DecoderConfig(**(fields | overrides))
