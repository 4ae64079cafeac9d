"""DeepSeekMoE 16B (DeepSeek-V1, arXiv:2401.06066)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.models.family import (
    GGUF,
    ExpertNames,
    Model,
    UnsupportedModelError,
    model,
    refuse_windows,
)
from makeready.graphs.models.moe import (
    check_experts,
    read_sizes,
    shared_experts,
    sparse_decoder,
    sparse_layers,
)

if TYPE_CHECKING:
    from makeready.graphs.checkpoint.gguf_names import Fields

_NAMES = ExpertNames()


def _of_gguf(fields: Fields, config: dict[str, Any], source: str) -> None:
    refuse_windows(fields, config, source)
    sizes = {
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "n_shared_experts": "expert_shared_count",
        "first_k_dense_replace": "leading_dense_block_count",
    }
    read_sizes(fields, config, source, "deepseek", sizes)
    config["routed_scaling_factor"] = fields.number("deepseek.expert_weights_scale") or 1.0


@model(
    "DeepseekForCausalLM",
    model_type="deepseek",
    defaults={
        "max_position_embeddings": 2048,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "n_shared_experts": None,
        "routed_scaling_factor": 1.0,
    },
    experts=_NAMES,
    gguf=GGUF(
        "deepseek",
        names={
            **_NAMES.gguf(),
            "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
            "ffn_down_shexp": "mlp.shared_experts.down_proj",
        },
        interleaved=True,
        experts=True,
        complete=_of_gguf,
    ),
)
def deepseek(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Shared experts, which are one wide MLP, and dense first layers."""
    from makeready.graphs.layers.moe import ExpertsConfig, Routing
    from makeready.graphs.models.decoder import dense

    check_experts(config, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    if config["scoring_func"] != "softmax":
        raise UnsupportedModelError(
            f"scoring_func {config['scoring_func']!r} is not supported; DeepSeek-V1 uses 'softmax'"
        )
    shared, width = shared_experts(config), config["moe_intermediate_size"]
    bias = bool(config.get("attention_bias"))
    return sparse_decoder(
        dense(config, qkv_bias=bias, output_bias=bias),
        ExpertsConfig(
            config["n_routed_experts"],
            width,
            Routing(
                config["num_experts_per_tok"],
                renormalise=bool(config["norm_topk_prob"]),
                scale=float(config["routed_scaling_factor"]),
            ),
            _NAMES,
            shared="shared_experts",
            shared_intermediate=shared * width,
        ),
        sparse_layers(config),
        context_len=context_len,
        activation=activation,
    )
