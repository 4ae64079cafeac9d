"""gpt-oss 20B and 120B (arXiv:2508.10925): attention with sinks, every other layer with a window, clamped SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import ExpertNames, Model, UnsupportedModelError, model
from makeready.graphs.models.moe import check_experts, one_spelling, sparse_decoder

_NAMES = ExpertNames(router="router", interleaved=True)
_ALPHA = 1.702  # the sigmoid's factor, which no config states
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _rename(config: dict[str, Any], source: str) -> None:
    """transformers 5 may write ``num_experts``; the released files say some things twice."""
    one_spelling(config, "num_local_experts", "num_experts", source)
    config.setdefault("num_local_experts", 128)
    one_spelling(config, "num_experts_per_tok", "experts_per_token", source)
    config.setdefault("num_experts_per_tok", 4)
    if all(config.get(name) is None for name in ("rope_parameters", "rope_scaling")):
        config["rope_parameters"] = dict(_ROPE)
    stated = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if all(isinstance(part, dict) and part.get("rope_theta") is None for part in (config, *stated)):
        config["rope_theta"] = 150000.0


def _windows(config: dict[str, Any], source: str) -> None:
    """Layers 0, 2, 4, ... slide."""
    if config.get("layer_types") is None and config.get("sliding_window") is not None:
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[i % 2] for i in range(config["num_hidden_layers"])]


def _limit(config: Mapping[str, Any]) -> float:
    limit = config["swiglu_limit"]
    if type(limit) not in (int, float) or not 0 < limit < math.inf:
        raise CheckpointError(
            f"config.json: swiglu_limit must be a positive number, not {limit!r}; correct the config"
        )
    return float(limit)


@model(
    "GptOssForCausalLM",
    model_type="gpt_oss",
    defaults={
        "head_dim": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_limit": 7.0,
    },
    rename=_rename,
    windows=_windows,
    experts=_NAMES,
)
def gpt_oss(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Every layer a mixture; a token's weights are the softmax over the logits of its experts alone.

    That is the softmax over all, divided by the sum of those chosen.
    """
    import functools

    from makeready.graphs.layers.moe import ExpertsConfig, Routing
    from makeready.graphs.models.decoder import dense
    from makeready.kernels import elementwise

    if config["hidden_act"] != "silu":
        raise UnsupportedModelError(
            f"hidden_act {config['hidden_act']!r} is not supported in gpt-oss; use a model with 'silu'"
        )
    check_experts(config, "num_local_experts", "num_experts_per_tok")
    bias = config["attention_bias"]
    return sparse_decoder(
        dense(config, qkv_bias=bias, output_bias=bias, sinks=True),
        ExpertsConfig(
            config["num_local_experts"],
            config["intermediate_size"],
            Routing(config["num_experts_per_tok"], renormalise=True),
            _NAMES,
            bias=True,
            activation=functools.partial(elementwise.clamped_swiglu, alpha=_ALPHA, limit=_limit(config)),
        ),
        lambda index: True,
        context_len=context_len,
        activation=activation,
    )
