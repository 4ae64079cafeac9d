"""What configs of checkpoints in 8 bits say, and tiny models to quantize."""

from __future__ import annotations

from typing import Any

from tiny_programs import LLAMA

from makeready.graphs.quant.scheme import Scheme

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
WIDE = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}
LAYERS = LLAMA["num_hidden_layers"]
MIXTURE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def compressed(weights: dict[str, Any], activations: dict[str, Any], **more: Any) -> dict[str, Any]:
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, **weights},
        "input_activations": {**eight, **activations},
    }
    made = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    return {**made, "config_groups": {"group_0": {**group, **more.pop("group", {})}}, **more}


TOKEN, TENSOR = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
HEAD = ("lm_head",)
CHANNEL = {"strategy": "channel"}
INT8 = Scheme("channel", stored=True, dtype="int8", ignored=HEAD)


def integers(weights: dict[str, Any], activations: dict[str, Any], **more: Any) -> dict[str, Any]:
    kind = {"type": "int"}
    return compressed(weights | kind, activations | kind, **{"format": "int-quantized", **more})


def mixed(said: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """A file with a second group, of attention's linears."""
    (first,) = said["config_groups"].values()
    second = {**first, "targets": ["re:.*self_attn.*"], "weights": {**first["weights"], **weights}}
    groups = {
        "group_0": {**first, "format": "int-quantized"},
        "group_1": {**second, "format": "int-quantized"},
    }
    return {**said, "format": "mixed-precision", "config_groups": groups}
