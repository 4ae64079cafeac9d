"""Llama 1 to 3.x and checkpoints in its layout (SmolLM2, Yi, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.models.decoder import DecoderConfig
from makeready.graphs.models.family import dense, family


@family("LlamaForCausalLM")
def llama(config: Mapping[str, Any]) -> DecoderConfig:
    """``attention_bias`` covers all four projections of attention."""
    bias = bool(config.get("attention_bias"))
    return dense(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias")))
