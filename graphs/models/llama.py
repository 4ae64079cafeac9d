"""Llama 1 to 3.x and checkpoints in its layout (SmolLM2, Yi, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.models.family import GGUF, Model, model

if TYPE_CHECKING:
    from makeready.graphs.checkpoint.gguf_names import Fields


def _of_gguf(fields: Fields, config: dict[str, Any], source: str) -> None:
    """Llama with a window on every layer is what Hugging Face calls Mistral."""
    if config["sliding_window"]:
        config["model_type"] = "mistral"


@model(
    "LlamaForCausalLM",
    model_type="llama",
    defaults={"max_position_embeddings": 2048},
    gguf=GGUF("llama", interleaved=True, complete=_of_gguf),
)
def llama(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """``attention_bias`` covers all four projections of attention."""
    from makeready.graphs.models.decoder import Decoder, dense

    bias = bool(config.get("attention_bias"))
    read = dense(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias")))
    return Decoder(read, context_len=context_len, activation=activation)
