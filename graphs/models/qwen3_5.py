"""The text models of Qwen3.5, dense and with experts: gated delta nets, every fourth layer gated attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.models.family import ExpertNames, Model, model
from makeready.graphs.models.hybrid import DEFAULTS, KINDS, hybrid_decoder, layers_by_kind, partial_rope
from makeready.graphs.models.moe import check_experts, one_spelling

NAMES = ExpertNames()
SHARED = "shared_expert_intermediate_size"


def _rename(config: dict[str, Any], source: str) -> None:
    """No layer is dense, so the config need not say how wide those would be."""
    one_spelling(config, "num_experts", "num_local_experts", source)
    if config.get("intermediate_size") is None:
        config["intermediate_size"] = config.get("moe_intermediate_size", 512)


@model(
    "Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    defaults={**DEFAULTS, "num_key_value_heads": 4},
    windows=layers_by_kind,
    kinds=KINDS,
    rope=partial_rope,
    within="qwen3_5",
)
def qwen3_5(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """What a token is projected to is stored in tensors of their own."""
    return hybrid_decoder(config, interleaved=False, context_len=context_len, activation=activation)


@model(
    "Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        SHARED: 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
    },
    rename=_rename,
    windows=layers_by_kind,
    kinds=KINDS,
    rope=partial_rope,
    experts=NAMES,
    within="qwen3_5_moe",
)
def qwen3_5_moe(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Every layer is a mixture with a shared expert; weights of a token's experts are divided by their sum."""
    from makeready.graphs.layers.moe import ExpertsConfig, Routing

    check_experts(config, "num_experts", "num_experts_per_tok", "moe_intermediate_size", SHARED)
    experts = ExpertsConfig(
        config["num_experts"],
        config["moe_intermediate_size"],
        Routing(config["num_experts_per_tok"], renormalise=True),
        NAMES,
        shared="shared_expert",
        shared_intermediate=config[SHARED],
        shared_gate="shared_expert_gate",
    )
    return hybrid_decoder(
        config, interleaved=False, context_len=context_len, activation=activation, experts=experts
    )
