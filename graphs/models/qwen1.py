"""Qwen 1 (Qwen-1.8B, 7B, 14B, 72B), whose modeling file came with its checkpoints and is not in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.models.family import Model, UnsupportedModelError, model

# Fields that would change the computation, and what they are where they do not.
_NEUTRAL = {"rotary_pct": 1.0, "scale_attn_weights": True, "use_cache_quantization": False}
_SPELLED = {"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta"}


def _rename(config: dict[str, Any], source: str) -> None:
    for own, common in _SPELLED.items():
        if own in config:
            config.setdefault(common, config.pop(own))
    for name in ("use_dynamic_ntk", "use_logn_attn", "no_bias"):
        if type(config.setdefault(name, True)) is not bool:
            raise CheckpointError(f"{source}: {name} must be true or false; correct the config")
    length = config.get("seq_length")
    if type(length) is not int or length < 2:
        raise CheckpointError(
            f"{source}: seq_length must be the tokens that the model was trained on, not {length!r}; correct it"
        )


@model(
    "QWenLMHeadModel",
    model_type="qwen",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 22016,
        "max_position_embeddings": 8192,
    },
    rename=_rename,
)
def qwen1(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """``intermediate_size`` counts the MLP's gate and up together; ``w2`` is the gate.

    A prompt's base is that of its whole length, as in a forward over all of it at once; see
    ``kernels.rope.rope_rows_stepped``.

    Raises:
        UnsupportedModelError: a setting that no released model has.
    """
    from makeready.graphs.layers.dense import GatedMLP, RMSNorm
    from makeready.graphs.layers.qwen1 import FusedAttention, PromptRotaryRows, Qwen1Layer
    from makeready.graphs.models.decoder import Decoder, DecoderConfig, dense

    for field, neutral in _NEUTRAL.items():
        if config.get(field, neutral) != neutral:
            raise UnsupportedModelError(
                f"{field} {config[field]!r} is not supported; use a model with {neutral}"
            )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("kv_channels", hidden // heads) * heads != hidden or config["num_key_value_heads"] != heads:
        raise UnsupportedModelError(
            f"kv_channels {config.get('kv_channels')} times {heads} heads is not hidden_size {hidden}; "
            "use a model where it is"
        )
    bias = not config["no_bias"]

    def layer(c: DecoderConfig, index: int) -> Qwen1Layer:
        source = f"transformer.h.{index}"
        return Qwen1Layer(
            RMSNorm(f"{source}.ln_1", c.hidden, c.norm_eps),
            FusedAttention(f"{source}.attn", f"layers.{index}", hidden=c.hidden, heads=c.heads, bias=bias),
            RMSNorm(f"{source}.ln_2", c.hidden, c.norm_eps),
            GatedMLP(f"{source}.mlp", c.hidden, c.intermediate, bias=bias, names=("w2", "w1", "c_proj")),
        )

    read = dense(config, intermediate=config["intermediate_size"] // 2)
    rope = PromptRotaryRows(
        read.head_dim,
        config["rope_parameters"]["rope_theta"],
        context_len=context_len,
        original_context=config["seq_length"],
        dynamic=config["use_dynamic_ntk"],
        logn=config["use_logn_attn"],
    )
    return Decoder(
        read,
        context_len=context_len,
        activation=activation,
        layer=layer,
        rope=rope,
        embedding="transformer.wte.weight",
        last_norm="transformer.ln_f",
    )
