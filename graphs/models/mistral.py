"""Mistral 7B and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.models.decoder import DecoderConfig
from makeready.graphs.models.family import dense, family


@family("MistralForCausalLM")
def mistral(config: Mapping[str, Any]) -> DecoderConfig:
    """A sliding window on every layer where the config has one."""
    return dense(config, windows=(config.get("sliding_window") or 0,) * config["num_hidden_layers"])
