"""Qwen2, Qwen2.5 and Qwen3, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.models.decoder import DecoderConfig
from makeready.graphs.models.family import dense, family


@family("Qwen2ForCausalLM")
def qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    """Biases on queries, keys and values alone."""
    return dense(config, windows=_windows(config), qkv_bias=True)


@family("Qwen3ForCausalLM")
def qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """Head norms on queries and keys."""
    bias = bool(config.get("attention_bias"))
    return dense(config, windows=_windows(config), qkv_bias=bias, output_bias=bias, qk_norm=True)


def _windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers from ``max_window_layers`` on slide, unless ``layer_types`` says which do."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window") or 0
    if not config.get("use_sliding_window") or not window:
        return (0,) * layers
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", layers)
        return tuple(window if i >= first else 0 for i in range(layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
