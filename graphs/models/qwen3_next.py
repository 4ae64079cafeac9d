"""Qwen3-Next: gated delta nets, every fourth layer gated attention, and many small experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.models.family import ExpertNames, Model, model
from makeready.graphs.models.hybrid import DEFAULTS, KINDS, hybrid_decoder, layers_by_kind, partial_rope
from makeready.graphs.models.moe import check_experts
from makeready.graphs.models.qwen_moe import rename, sparse_layers

NAMES = ExpertNames()
SHARED = "shared_expert_intermediate_size"


@model(
    "Qwen3NextForCausalLM",
    model_type="qwen3_next",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 2,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        SHARED: 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
    },
    rename=rename,
    windows=layers_by_kind,
    kinds=KINDS,
    rope=partial_rope,
    experts=NAMES,
)
def qwen3_next(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """What a token is projected to is stored key head by key head."""
    from makeready.graphs.layers.moe import ExpertsConfig, Routing

    experts, sparse = None, sparse_layers(config)
    if config["num_experts"] and any(map(sparse, range(config["num_hidden_layers"]))):
        check_experts(config, "num_experts", "num_experts_per_tok", "moe_intermediate_size", SHARED)
        experts = ExpertsConfig(
            config["num_experts"],
            config["moe_intermediate_size"],
            Routing(config["num_experts_per_tok"], renormalise=bool(config["norm_topk_prob"])),
            NAMES,
            shared="shared_expert",
            shared_intermediate=config[SHARED],
            shared_gate="shared_expert_gate",
        )
    return hybrid_decoder(
        config,
        interleaved=True,
        context_len=context_len,
        activation=activation,
        experts=experts,
        sparse=sparse,
    )
