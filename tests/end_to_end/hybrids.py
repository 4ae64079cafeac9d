"""Tiny random models with gated delta nets beside attention: Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference import make_model

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 80, "page_size": 8, "weight_dtype": "float32"}
LENGTHS = (1, 2, 3, 4, 8, 9, 24, 65, 90)
NET: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 12,
}
MOE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "next": ("qwen3_next", MOE),
    "next-dense": ("qwen3_next", {"mlp_only_layers": [0, 1, 2, 3], "attention_bias": True}),
    "next-every-other": (
        "qwen3_next",
        {
            **MOE,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "3.5": (
        "qwen3_5",
        {"linear_num_value_heads": 2, "linear_value_head_dim": 40, "tie_word_embeddings": True},
    ),
    "3.5-moe": ("qwen3_5_moe", MOE),
}


def model_of(folder: Path, name: str, **changes: Any) -> Any:
    """The model; decays are small enough that states reach far, and some forget at once."""
    family, config = MODELS[name]
    model = make_model(folder, family, **(NET | config | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, -6, 1)
    model.save_pretrained(folder)
    return model
