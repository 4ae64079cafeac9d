"""Checkpoints of DeepSeek-V2 and V3 as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from checkpoint_files import finish_gguf
from moe_models import stacked_by_part
from safetensors.torch import load_file


def latent_gguf(
    folder: Path,
    *,
    split: bool,
    quantized: gguf.GGMLQuantizationType | None = None,
    log_multiplier: bool = True,
) -> Path:
    """The checkpoint in ``folder``.

    Args:
        split: as since 2025: what makes keys and values of latents is two tensors.
        quantized: block type of all matrices of attention; None leaves them as they are.
        log_multiplier: whether it says how YaRN scales scores, as files of 2024 do not.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(folder / "model.gguf", "deepseek2")
    v3 = config["model_type"] == "deepseek_v3"
    rank, rope, nope, value = (
        config[name] for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1 if split else config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope if split else nope + rope)
    writer.add_value_length(rank if split else value)
    if split:
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(value)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if v3:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if config["n_group"]:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    _yarn(writer, config["rope_parameters"], log_multiplier)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    for name, tensor in stacked_by_part(load_file(folder / "model.safetensors")).items():
        values = {name.replace("e_score_correction_bias", "e_score_correction.bias"): tensor.float().numpy()}
        if split and "kv_b_proj" in name:
            of_head = tensor.numpy().reshape(-1, nope + value, rank)
            values = {
                name.replace("kv_b", "k_b"): of_head[:, :nope].transpose(0, 2, 1),
                name.replace("kv_b", "v_b"): of_head[:, nope:],
            }
        for one, array in values.items():
            stored = names.get_name(one, (".weight", ".bias"))
            array = np.ascontiguousarray(array)
            if quantized is not None and "attn" in stored and array.ndim > 1:
                writer.add_tensor(stored, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
            else:
                writer.add_tensor(stored, array)
    return finish_gguf(writer)


def _yarn(writer: gguf.GGUFWriter, rope: dict[str, Any], log_multiplier: bool) -> None:
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if log_multiplier:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
