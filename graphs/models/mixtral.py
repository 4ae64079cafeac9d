"""Mixtral 8x7B and 8x22B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.models.family import (
    GGUF,
    ExpertNames,
    Model,
    every_layer_slides,
    model,
    refuse_windows,
)
from makeready.graphs.models.moe import check_experts, one_spelling, read_sizes, sparse_decoder

if TYPE_CHECKING:
    from makeready.graphs.checkpoint.gguf_names import Fields

_NAMES = ExpertNames("block_sparse_moe", "w1", "w3", "w2")


def _rename(config: dict[str, Any], source: str) -> None:
    """Some files write ``num_experts``."""
    one_spelling(config, "num_local_experts", "num_experts", source)


def _of_gguf(fields: Fields, config: dict[str, Any], source: str) -> None:
    refuse_windows(fields, config, source)
    sizes = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
    read_sizes(fields, config, source, "llama", sizes)


@model(
    "MixtralForCausalLM",
    model_type="mixtral",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
    },
    rename=_rename,
    windows=every_layer_slides,
    experts=_NAMES,
    gguf=GGUF("llama", names=_NAMES.gguf(), interleaved=True, experts=True, complete=_of_gguf),
)
def mixtral(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Every layer a mixture, weights divided by their sum."""
    from makeready.graphs.layers.moe import ExpertsConfig, Routing
    from makeready.graphs.models.decoder import dense

    check_experts(config, "num_local_experts", "num_experts_per_tok")
    return sparse_decoder(
        dense(config),
        ExpertsConfig(
            config["num_local_experts"],
            config["intermediate_size"],
            Routing(config["num_experts_per_tok"], renormalise=True),
            _NAMES,
        ),
        lambda index: True,
        context_len=context_len,
        activation=activation,
    )
