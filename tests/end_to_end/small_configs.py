"""Configs of small models of several families, of sizes that are no multiples of vectors or panels; fp32."""

from __future__ import annotations

from typing import Any

VOCABULARY = 96
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 40,  # no multiple of a vector or a panel
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
WINDOWED: dict[str, Any] = {
    **{k: v for k, v in QWEN3.items() if k not in ("rope_theta", "head_dim")},
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 11,
}
LATENT: dict[str, Any] = {
    **{k: v for k, v in QWEN3.items() if k not in ("head_dim", "num_key_value_heads")},
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 1,
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
}
