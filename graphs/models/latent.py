"""What models with latent attention and mixtures of experts have in common: DeepSeek-V2 (arXiv:2405.04434) and V3
(arXiv:2412.19437).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import ExpertNames, Model, UnsupportedModelError
from makeready.graphs.models.moe import check_experts, shared_experts, sparse_decoder, sparse_layers

if TYPE_CHECKING:
    from makeready.graphs.layers.latent_attention import LatentConfig
    from makeready.graphs.layers.moe import Routing

NAMES = ExpertNames()
DEFAULTS: dict[str, Any] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "kv_b_split": False,  # see LatentConfig.split; no published config says it
}
METHODS = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}  # how many experts say how good a group is
_MOST = 2**16  # far above any model's ranks and heads


def rename(config: dict[str, Any], source: str) -> None:
    """What is rotated is the size of a head to the rotary settings, and every head has keys of its own.

    Raises:
        CheckpointError: it is no even number of features.
    """
    size = config.setdefault("qk_rope_head_dim", DEFAULTS["qk_rope_head_dim"])
    if type(size) is not int or size < 2 or size % 2 or size > _MOST:
        raise CheckpointError(
            f"{source}: qk_rope_head_dim must be a positive even integer, not {size!r}; correct the config"
        )
    config["head_dim"] = size
    config["num_key_value_heads"] = config.get("num_attention_heads")


def latent_decoder(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """The model that a config of DeepSeek-V2 or V3 describes.

    Raises:
        CheckpointError: a size is missing or impossible.
        UnsupportedModelError: sparse attention, or a way to choose experts that is not known.
    """
    from makeready.graphs.layers.latent_attention import LatentAttention
    from makeready.graphs.layers.moe import ExpertsConfig
    from makeready.graphs.models.decoder import dense

    if config.get("index_topk"):
        raise UnsupportedModelError(
            "index_topk is set: sparse attention (DSA, DeepSeek-V3.2) is not supported; use V3 or V3.1"
        )
    check_experts(config, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    routing, latent = _routing(config), _latent(config)
    experts = ExpertsConfig(
        config["n_routed_experts"],
        config["moe_intermediate_size"],
        routing,
        NAMES,
        correction="gate.e_score_correction_bias" if config["topk_method"] == "noaux_tc" else "",
        shared="shared_experts",
        shared_intermediate=shared_experts(config) * config["moe_intermediate_size"],
    )

    def attention(index: int) -> LatentAttention:
        source = f"model.layers.{index}.self_attn"
        return LatentAttention(source, f"layers.{index}", latent, activation=activation)

    return sparse_decoder(
        dense(config),
        experts,
        sparse_layers(config),
        context_len=context_len,
        activation=activation,
        attention=attention,
    )


def _latent(config: Mapping[str, Any]) -> LatentConfig:
    from makeready.graphs.layers.latent_attention import LatentConfig

    for field in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "q_lora_rank"):
        value = config[field]
        if field == "q_lora_rank" and value is None:
            continue
        if type(value) is not int or not 1 <= value <= _MOST:
            raise CheckpointError(
                f"config.json: {field} must be an integer from 1 to {_MOST}, not {value!r}; correct the config"
            )
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    return LatentConfig(
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        q_rank=config["q_lora_rank"] or 0,
        rank=config["kv_lora_rank"],
        nope=nope,
        rope=rope,
        value=config["v_head_dim"],
        scale=(nope + rope) ** -0.5 * _sharper(config["rope_parameters"]) ** 2,
        interleaved=bool(config["rope_interleave"]),
        bias=config["attention_bias"],
        split=bool(config["kv_b_split"]),
    )


def _sharper(rope: Mapping[str, Any]) -> float:
    """What queries and keys are both multiplied by under YaRN, besides what rotary rows are (``mscale_all_dim``)."""
    factor = rope.get("factor", 1.0)
    if rope["rope_type"] != "yarn" or factor <= 1:
        return 1.0
    return 0.1 * rope.get("mscale_all_dim", 0.0) * math.log(factor) + 1.0


def _routing(config: Mapping[str, Any]) -> Routing:
    """How experts are chosen: by all (greedy), or those of the best groups.

    Raises:
        CheckpointError: groups do not divide the experts, or too few experts are eligible.
        UnsupportedModelError: another method or score.
    """
    from makeready.graphs.layers.moe import Routing

    method, score = config["topk_method"], config["scoring_func"]
    if method not in METHODS:
        raise UnsupportedModelError(
            f"topk_method {method!r} is not supported; use a model with one of {', '.join(METHODS)}"
        )
    if score not in ("softmax", "sigmoid"):
        raise UnsupportedModelError(
            f"scoring_func {score!r} is not supported; use a model with softmax or sigmoid"
        )
    experts, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    members = METHODS[method]
    groups, best = (config["n_group"] or 1, config["topk_group"] or 1) if members else (1, 1)
    if (
        type(groups) is not int
        or groups < 1
        or experts % groups
        or (groups > 1 and experts // groups < members)
    ):
        raise CheckpointError(
            f"config.json: n_group {groups!r} does not cut {experts} experts into groups of at least {members}; "
            "correct the config"
        )
    if type(best) is not int or not 1 <= best <= groups or best * (experts // groups) < top_k:
        raise CheckpointError(
            f"config.json: topk_group {best!r} of {groups} groups leaves no {top_k} experts to choose from; "
            "correct the config"
        )
    return Routing(
        top_k,
        score=score,
        renormalise=bool(config["norm_topk_prob"]),
        scale=float(config["routed_scaling_factor"]),
        groups=groups,
        top_groups=best,
        group_members=max(1, members),
    )
