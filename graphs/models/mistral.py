"""Mistral 7B and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.models.family import Model, every_layer_slides, model


@model(
    "MistralForCausalLM",
    model_type="mistral",
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    windows=every_layer_slides,
)
def mistral(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """A sliding window on every layer where the config has one."""
    from makeready.graphs.models.decoder import Decoder, dense

    return Decoder(dense(config), context_len=context_len, activation=activation)
