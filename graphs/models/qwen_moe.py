"""Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import GGUF, ExpertNames, Model, model, refuse_windows
from makeready.graphs.models.moe import check_experts, one_spelling, read_sizes, sparse_decoder
from makeready.graphs.models.qwen import DEFAULTS, windows

if TYPE_CHECKING:
    from makeready.graphs.checkpoint.gguf_names import Fields

_NAMES = ExpertNames()
_DEFAULTS = {**DEFAULTS, "decoder_sparse_step": 1, "norm_topk_prob": False}


def rename(config: dict[str, Any], source: str) -> None:
    """transformers 5 may write ``num_local_experts``, and a window of 0 for none; no ``mlp_only_layers`` is []."""
    one_spelling(config, "num_experts", "num_local_experts", source)
    if config.get("mlp_only_layers") is None:
        config["mlp_only_layers"] = []
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None


def sparse_layers(config: Mapping[str, Any]) -> Callable[[int], bool]:
    """Which layers are mixtures: every ``decoder_sparse_step``-th, but those of ``mlp_only_layers``."""
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"]
    if type(step) is not int or step < 1:
        raise CheckpointError(
            f"config.json: decoder_sparse_step must be a positive integer, not {step!r}; correct the config"
        )
    if not isinstance(dense, list) or any(type(index) is not int for index in dense):
        raise CheckpointError(
            f"config.json: mlp_only_layers must be a list of integers, not {dense!r:.80}; correct the config"
        )
    return lambda index: index not in dense and (index + 1) % step == 0


def _of_gguf(fields: Fields, config: dict[str, Any], source: str) -> None:
    """Sizes of experts; weights of Qwen3's are divided by their sum, as llama.cpp knows by the architecture."""
    refuse_windows(fields, config, source)
    architecture = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}[config["model_type"]]
    sizes = {
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    }
    if architecture == "qwen2moe":
        sizes["shared_expert_intermediate_size"] = "expert_shared_feed_forward_length"
    read_sizes(fields, config, source, architecture, sizes)
    if architecture == "qwen3moe":
        config["norm_topk_prob"] = True
    # Files without dense layers need not say how wide these would be.
    config["intermediate_size"] = config["intermediate_size"] or config["moe_intermediate_size"]


@model(
    "Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    defaults={**_DEFAULTS, "attention_bias": True, "num_key_value_heads": 16},
    rename=rename,
    windows=windows,
    experts=_NAMES,
    gguf=GGUF(
        "qwen2moe",
        names={
            **_NAMES.gguf(),
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        },
        experts=True,
        complete=_of_gguf,
    ),
)
def qwen2_moe(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """A shared expert, multiplied by the sigmoid of a projection; biases on queries, keys and values."""
    from makeready.graphs.layers.moe import ExpertsConfig, Routing
    from makeready.graphs.models.decoder import dense

    shared = "shared_expert_intermediate_size"
    check_experts(config, "num_experts", "num_experts_per_tok", "moe_intermediate_size", shared)
    bias = bool(config.get("qkv_bias", True))
    return sparse_decoder(
        dense(config, qkv_bias=bias),
        ExpertsConfig(
            config["num_experts"],
            config["moe_intermediate_size"],
            Routing(config["num_experts_per_tok"], renormalise=bool(config["norm_topk_prob"])),
            _NAMES,
            shared="shared_expert",
            shared_intermediate=config[shared],
            shared_gate="shared_expert_gate",
        ),
        sparse_layers(config),
        context_len=context_len,
        activation=activation,
    )


@model(
    "Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    defaults={**_DEFAULTS, "num_key_value_heads": 4},
    rename=rename,
    windows=windows,
    experts=_NAMES,
    gguf=GGUF("qwen3moe", names=_NAMES.gguf(), experts=True, complete=_of_gguf),
)
def qwen3_moe(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Head norms on queries and keys; no shared expert."""
    from makeready.graphs.layers.moe import ExpertsConfig, Routing
    from makeready.graphs.models.decoder import dense

    check_experts(config, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    bias = bool(config.get("attention_bias"))
    return sparse_decoder(
        dense(config, qkv_bias=bias, output_bias=bias, qk_norm=True),
        ExpertsConfig(
            config["num_experts"],
            config["moe_intermediate_size"],
            Routing(config["num_experts_per_tok"], renormalise=bool(config["norm_topk_prob"])),
            _NAMES,
        ),
        sparse_layers(config),
        context_len=context_len,
        activation=activation,
    )
