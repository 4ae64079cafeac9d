"""Gemma 3, text: sandwich norms, windows on five layers of six, and a rotary base for each of the two kinds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.checkpoint.rope import normalise_rope_by_kind
from makeready.graphs.models.family import GGUF, Model, UnsupportedModelError, longest_context, model

if TYPE_CHECKING:
    from makeready.graphs.checkpoint.gguf_names import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
_THETA = {FULL: 1e6, SLIDING: 1e4}
# Fields that would change the computation, and what they are where they do not.
_NEUTRAL = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def _rename(config: dict[str, Any], source: str) -> None:
    """``hidden_activation`` is the common ``hidden_act``; rotary settings are by kind of layer in any spelling."""
    config["hidden_act"] = config.pop("hidden_activation", None) or config.get(
        "hidden_act", "gelu_pytorch_tanh"
    )
    stated, scaling = (config.pop(name, None) or {} for name in ("rope_parameters", "rope_scaling"))
    for name, value in (("rope_parameters", stated), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise CheckpointError(f"{source}: {name} must be an object, not {value!r}; correct the config")
    theta = {FULL: config.pop("rope_theta", None), SLIDING: config.pop("rope_local_base_freq", None)}
    if any(isinstance(value, dict) for value in stated.values()):
        if set(stated) - {FULL, SLIDING}:
            raise CheckpointError(
                f"{source}: rope_parameters must be those of {FULL} and {SLIDING}; correct the config"
            )
        kinds = {FULL: stated.get(FULL) or {}, SLIDING: stated.get(SLIDING) or {}}
    else:
        kinds = {FULL: stated, SLIDING: {}}
    kinds[FULL] = {**kinds[FULL], **scaling}
    config["rope_parameters"] = {
        kind: {"rope_theta": _THETA[kind] if theta[kind] is None else theta[kind]}
        | {name: value for name, value in values.items() if value is not None}
        for kind, values in kinds.items()
    }


def _windows(config: dict[str, Any], source: str) -> None:
    """Every layer slides but the last of each ``sliding_window_pattern``."""
    stated = [config.pop(name, None) for name in ("sliding_window_pattern", "_sliding_window_pattern")]
    pattern = next((value for value in stated if value is not None), 6)
    if type(pattern) is not int or pattern < 1:
        raise CheckpointError(
            f"{source}: sliding_window_pattern must be a positive integer; correct the config"
        )
    if config.get("layer_types") is None:
        layers = range(1, config["num_hidden_layers"] + 1)
        config["layer_types"] = [SLIDING if i % pattern else FULL for i in layers]


def _longest(config: Mapping[str, Any]) -> int:
    """What the layers that see all tokens were made for; a factor counts from fewer positions than are stated."""
    return min(
        longest_context({**config, "rope_parameters": config["rope_parameters"][FULL]}),
        config["max_position_embeddings"],
    )


def _of_gguf(fields: Fields, config: dict[str, Any], source: str) -> None:
    """Norms hold 1 more than Hugging Face's; the base of sliding layers and their pattern may be left out.

    The scale of queries is never there: llama.cpp, too, knows the 27B model by its layers.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config["num_hidden_layers"] == 62 and heads and hidden:
        config["query_pre_attn_scalar"] = hidden // heads
    elif config["head_dim"]:
        config["query_pre_attn_scalar"] = config["head_dim"]
    config["hidden_act"] = "gelu_pytorch_tanh"
    config["norm_offset"] = 0.0
    config["rope_local_base_freq"] = fields.number("gemma3.rope.freq_base_swa")
    config["sliding_window_pattern"] = fields.integer("gemma3.attention.sliding_window_pattern")


@model(
    "Gemma3ForCausalLM",
    model_type="gemma3_text",
    defaults={
        "head_dim": 256,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "norm_offset": 1.0,  # what norms add to their weights
    },
    rename=_rename,
    windows=_windows,
    rope=normalise_rope_by_kind,
    longest=_longest,
    gguf=GGUF(
        "gemma3",
        names={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        complete=_of_gguf,
    ),
)
def gemma3(config: Mapping[str, Any], *, context_len: int, activation: str) -> Model:
    """Embeddings are multiplied by the root of the width."""
    from makeready.graphs.layers.attention import Attention
    from makeready.graphs.layers.dense import GatedMLP, RMSNorm
    from makeready.graphs.layers.sandwich import RotaryRowsByKind, SandwichLayer
    from makeready.graphs.models.decoder import Decoder, DecoderConfig, dense

    for field, neutral in _NEUTRAL.items():
        if config.get(field) not in (None, neutral):
            raise UnsupportedModelError(f"{field} {config[field]!r} is not supported; use a model without it")
    norm = functools.partial(RMSNorm, offset=config["norm_offset"])
    bias = config["attention_bias"]

    def layer(c: DecoderConfig, index: int) -> SandwichLayer:
        source = f"model.layers.{index}"
        attention = Attention(
            f"{source}.self_attn",
            f"layers.{index}",
            hidden=c.hidden,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            qkv_bias=bias,
            output_bias=bias,
            window=c.windows[index],
            norm_eps=c.norm_eps,
            norm_offset=config["norm_offset"],
            scale=config["query_pre_attn_scalar"] ** -0.5,
        )
        mlp = GatedMLP(f"{source}.mlp", c.hidden, c.intermediate, bias=False, activation=c.activation)
        return SandwichLayer(
            source,
            attention,
            mlp,
            kind=config["layer_types"][index],
            norm=lambda name: norm(name, c.hidden, c.norm_eps),
        )

    read = dense(config)
    return Decoder(
        read,
        context_len=context_len,
        activation=activation,
        layer=layer,
        rope=RotaryRowsByKind(read.rope, read.head_dim, context_len),
        norm=norm,
        embedding_scale=math.sqrt(read.hidden),
    )
