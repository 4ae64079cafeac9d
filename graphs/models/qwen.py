"""Qwen2, Qwen2.5 and Qwen3, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import GGUF, Model, model, no_windows

DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def windows(config: dict[str, Any], source: str) -> None:
    """Layers from ``max_window_layers`` on slide where ``use_sliding_window`` says so, and no ``layer_types``."""
    if not config["use_sliding_window"]:
        return no_windows(config, source)
    if config.get("layer_types") is None and config["sliding_window"] is not None:
        first, layers = config["max_window_layers"], range(config["num_hidden_layers"])
        if type(first) is not int or first < 0:
            raise CheckpointError(
                f"{source}: max_window_layers must be an integer of at least 0, not {first!r}; correct it"
            )
        config["layer_types"] = ["sliding_attention" if i >= first else "full_attention" for i in layers]
    return None


@model(
    "Qwen2ForCausalLM",
    model_type="qwen2",
    # There is no such field as attention_bias: q, k and v always have one, o never.
    defaults={**DEFAULTS, "attention_bias": True},
    windows=windows,
    gguf=GGUF("qwen2"),
)
def qwen2(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Biases on queries, keys and values alone."""
    from makeready.graphs.models.decoder import Decoder, dense

    return Decoder(dense(config, qkv_bias=True), context_len=context_len, activation=activation)


@model(
    "Qwen3ForCausalLM",
    model_type="qwen3",
    defaults={**DEFAULTS, "head_dim": 128},
    windows=windows,
    gguf=GGUF("qwen3"),
)
def qwen3(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Head norms on queries and keys."""
    from makeready.graphs.models.decoder import Decoder, dense

    bias = bool(config.get("attention_bias"))
    read = dense(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
    return Decoder(read, context_len=context_len, activation=activation)
