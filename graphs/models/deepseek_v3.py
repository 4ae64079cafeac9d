"""DeepSeek-V3, R1 and V3.1 (arXiv:2412.19437)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.models.family import Model, model
from makeready.graphs.models.latent import DEFAULTS, NAMES, latent_decoder, rename


@model(
    "DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
    rename=rename,
    experts=NAMES,
)
def deepseek_v3(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Experts by sigmoid with a correction of the choice, of the groups whose two best are best."""
    return latent_decoder(config, context_len=context_len, activation=activation)
