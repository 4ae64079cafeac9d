"""DeepSeek-V2, V2-Lite and V2.5 (arXiv:2405.04434), and how GGUF files of V2 and V3 are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import GGUF, Model, UnsupportedModelError, model, refuse_windows
from makeready.graphs.models.latent import DEFAULTS, NAMES, latent_decoder, rename
from makeready.graphs.models.moe import read_sizes

if TYPE_CHECKING:
    from makeready.graphs.checkpoint.gguf_names import Fields

_SCORES = {1: "softmax", 2: "sigmoid"}  # expert_gating_func, which older files of V2 lack


def _of_gguf(fields: Fields, config: dict[str, Any], source: str) -> None:
    """Architecture ``deepseek2``: V2, and V3 where experts are scored by sigmoid.

    Files with ``attention.key_length_mla`` have what makes keys and values of latents as two tensors. Files that name
    no groups of experts are meant without: they were made before llama.cpp knew groups.
    """
    refuse_windows(fields, config, source)
    key = "deepseek2"
    sizes = {
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "n_shared_experts": "expert_shared_count",
        "first_k_dense_replace": "leading_dense_block_count",
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count",
    }
    config["kv_b_split"] = split = fields.integer(f"{key}.attention.key_length_mla") is not None
    heads = {"qk_head_dim": "attention.key_length", "v_head_dim": "attention.value_length"}
    sizes |= {name: f"{size}_mla" if split else size for name, size in heads.items()}
    read_sizes(fields, config, source, key, sizes)
    config["qk_nope_head_dim"] = config["qk_head_dim"] - config["qk_rope_head_dim"]
    config["q_lora_rank"] = fields.integer(f"{key}.attention.q_lora_rank")
    config["intermediate_size"] = config["intermediate_size"] or config["moe_intermediate_size"]
    config["routed_scaling_factor"] = fields.number(f"{key}.expert_weights_scale") or 1.0
    config["norm_topk_prob"] = bool(fields.flag(f"{key}.expert_weights_norm"))
    gate = fields.integer(f"{key}.expert_gating_func") or 1
    if gate not in _SCORES:
        raise CheckpointError(
            f"{source}: {key}.expert_gating_func={gate} is not supported; use a model with 1 (softmax) or 2 (sigmoid)"
        )
    groups = fields.integer(f"{key}.expert_group_count") or 1
    config["n_group"], config["topk_group"] = groups, fields.integer(f"{key}.expert_group_used_count") or 1
    config["scoring_func"] = _SCORES[gate]
    config["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    if gate == 2:
        config["model_type"], config["topk_method"] = "deepseek_v3", "noaux_tc"
    _yarn(fields.number(f"{key}.rope.scaling.yarn_log_multiplier"), config["rope_parameters"])


def _yarn(multiplier: float | None, rope: dict[str, Any]) -> None:
    """The file says ``0.1 * mscale_all_dim``, and means ``mscale`` to be the same: rotary rows keep their size."""
    if rope.get("rope_type") != "yarn":
        return
    if multiplier:
        rope["mscale"] = rope["mscale_all_dim"] = round(10 * multiplier, 6)
    else:
        rope["attention_factor"] = 1.0


_PARTS = {
    "attn_q_a": "q_a_proj",
    "attn_q_a_norm": "q_a_layernorm",
    "attn_q_b": "q_b_proj",
    "attn_kv_a_mqa": "kv_a_proj_with_mqa",
    "attn_kv_a_norm": "kv_a_layernorm",
    "attn_kv_b": "kv_b_proj",
    "attn_k_b": "k_b_proj",
    "attn_v_b": "v_b_proj",
}


@model(
    "DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 2048,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "n_group": None,
        "topk_group": None,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    rename=rename,
    experts=NAMES,
    gguf=GGUF(
        "deepseek2",
        names={
            **NAMES.gguf(),
            **{part: f"self_attn.{name}" for part, name in _PARTS.items()},
            "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
            "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
            "ffn_down_shexp": "mlp.shared_experts.down_proj",
        },
        experts=True,
        reads=frozenset({"attention.key_length", "rope.scaling.yarn_log_multiplier"}),
        complete=_of_gguf,
    ),
)
def deepseek_v2(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Experts by softmax, of the groups whose best expert is best."""
    if config["norm_topk_prob"] and config["routed_scaling_factor"] != 1:
        raise UnsupportedModelError(
            "norm_topk_prob with a routed_scaling_factor is read in two ways for DeepSeek-V2 and not supported; "
            "use a model with one of them"
        )
    return latent_decoder(config, context_len=context_len, activation=activation)
