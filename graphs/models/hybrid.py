"""What models with gated delta nets beside attention have in common: layers by kind, sizes that are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.checkpoint.rope import normalise_rope
from makeready.graphs.models.family import FULL, LINEAR, Model, UnsupportedModelError, no_windows

if TYPE_CHECKING:
    from makeready.graphs.layers.delta_net import DeltaNetConfig
    from makeready.graphs.layers.moe import ExpertsConfig

KINDS = (FULL, LINEAR)
DEFAULTS = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_SIZES = {
    "linear_conv_kernel_dim": 8,
    "linear_key_head_dim": 256,
    "linear_value_head_dim": 1024,
    "linear_num_key_heads": 1024,
    "linear_num_value_heads": 1024,
}


def layers_by_kind(config: dict[str, Any], source: str) -> None:
    """Every ``full_attention_interval``-th layer attends, the others are delta nets; nothing slides."""
    no_windows(config, source)
    interval = config.pop("full_attention_interval", None)
    interval = 4 if interval is None else interval
    if config.get("layer_types") is None:
        if type(interval) is not int or interval < 1:
            raise CheckpointError(
                f"{source}: full_attention_interval must be a positive integer, not {interval!r}; correct the config"
            )
        layers = range(1, config["num_hidden_layers"] + 1)
        config["layer_types"] = [LINEAR if i % interval else FULL for i in layers]


def partial_rope(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A quarter of a head's features turn. Positions of images and videos, which have three axes, are those of text
    where there are none, so what is said of these axes (``mrope_section``) says nothing here."""
    read = {**config}
    for field in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(field), dict):
            read[field] = {
                k: v for k, v in config[field].items() if k not in ("mrope_section", "mrope_interleaved")
            }
            if read[field].get("rope_type", read[field].get("type")) == "mrope":
                read[field] |= {"rope_type": "default"}
    made = normalise_rope(read, source, partial=0.25)
    config.pop("partial_rotary_factor", None)
    return made


def hybrid_decoder(
    config: Mapping[str, Any],
    *,
    interleaved: bool,
    context_len: int,
    activation: str,
    experts: ExpertsConfig | None = None,
    sparse: Callable[[int], bool] = lambda index: True,
) -> Model:
    """Attention with gated outputs where ``layer_types`` says so, delta nets elsewhere; all norms add 1.

    Args:
        interleaved: see :class:`~makeready.graphs.layers.delta_net.DeltaNetConfig`.
        experts: of the layers that are mixtures, those for which ``sparse`` holds.

    Raises:
        CheckpointError: a size of the delta nets is missing or contradicts another.
        UnsupportedModelError: another activation than SiLU, no layer that attends, or no gates.
    """
    from makeready.graphs.layers.delta_net import GatedDeltaNet
    from makeready.graphs.layers.moe import MixtureOfExperts
    from makeready.graphs.models.decoder import Decoder, DecoderConfig, DecoderLayer, dense

    if config["hidden_act"] != "silu":
        raise UnsupportedModelError(
            f"hidden_act {config['hidden_act']!r} is not supported beside gated delta nets; use a model with 'silu'"
        )
    if not config.get("attn_output_gate", True):
        raise UnsupportedModelError(
            "attn_output_gate false is not supported; use a model whose attention is gated"
        )
    kinds = config["layer_types"]
    if FULL not in kinds:
        raise UnsupportedModelError(
            "a model of linear_attention layers alone is not supported; use one with a full_attention layer"
        )
    net = _net(config, interleaved)
    bias = config["attention_bias"]
    read = dense(config, qkv_bias=bias, output_bias=bias, qk_norm=True, output_gate=True, norm_offset=1.0)

    def layer(c: DecoderConfig, index: int) -> DecoderLayer:
        source = f"model.layers.{index}"
        attention = mlp = None
        if kinds[index] == LINEAR:
            attention = GatedDeltaNet(f"{source}.linear_attn", f"layers.{index}", net, activation=activation)
        if experts is not None and sparse(index):
            mlp = MixtureOfExperts(source, c.hidden, experts)
        return DecoderLayer(c, index, mlp, attention)

    return Decoder(read, context_len=context_len, activation=activation, layer=layer)


def _net(config: Mapping[str, Any], interleaved: bool) -> DeltaNetConfig:
    from makeready.graphs.layers.delta_net import DeltaNetConfig

    for field, most in _SIZES.items():
        value, least = config.get(field), 2 if field == "linear_conv_kernel_dim" else 1
        if type(value) is not int or not least <= value <= most:
            raise CheckpointError(
                f"config.json: {field} must be an integer from {least} to {most}, not {value!r}; correct the config"
            )
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if values % keys:
        raise CheckpointError(
            f"config.json: linear_num_value_heads ({values}) is not a multiple of linear_num_key_heads ({keys}); "
            "correct the config"
        )
    return DeltaNetConfig(
        hidden=config["hidden_size"],
        taps=config["linear_conv_kernel_dim"],
        key_heads=keys,
        key_dim=config["linear_key_head_dim"],
        value_heads=values,
        value_dim=config["linear_value_head_dim"],
        norm_eps=config["rms_norm_eps"],
        interleaved=interleaved,
    )
