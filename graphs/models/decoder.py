"""The dense decoder that Llama, Mistral, Qwen2, Qwen3 and their relatives are instances of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from makeready.graphs.layers.attention import Attention
from makeready.graphs.layers.delta_net import STATE
from makeready.graphs.layers.dense import BY_OUTPUTS, GatedMLP, RMSNorm
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import parameter
from makeready.graphs.layers.rope import RotaryRows
from makeready.graphs.models.family import UnsupportedModelError, windows
from makeready.graphs.plan.spec import CacheGroup, KVPart
from makeready.kernels import elementwise
from makeready.kernels import embedding as embeddings
from makeready.kernels.gemm import linear as gemm

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": elementwise.silu,
    "gelu_pytorch_tanh": elementwise.gelu_tanh,
}


@dataclass(frozen=True)
class DecoderConfig:
    """What sets one dense decoder apart from another.

    Attributes:
        windows: tokens that a token of each layer sees, itself included; 0 for all.
        qk_norm: whether queries and keys are normalised per head before rotation.
        sinks: whether heads have a logit that joins the denominators of their softmaxes.
        output_gate: whether what heads give is gated; see :class:`~makeready.graphs.layers.attention.Attention`.
        norm_offset: what all norms add to their weights as they are stored.
        rope: normalised ``rope_parameters``, complete with what the type needs.
        activation: what the MLP's gate goes through.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norm_eps: float
    rope: Mapping[str, Any]
    windows: tuple[int, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    output_gate: bool = False
    norm_offset: float = 0.0
    tied_embeddings: bool = False
    activation: Callable[[torch.Tensor], torch.Tensor] = elementwise.silu

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm MLP, each added to the residual stream.

    Args:
        mlp: called with the normed stream and the inputs; None is a :class:`GatedMLP`.
        attention: called with the normed stream, rotary rows and the inputs; None is grouped-query attention.
    """

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        mlp: nn.Module | None = None,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        source = f"model.layers.{index}"
        norm = functools.partial(RMSNorm, width=config.hidden, eps=config.norm_eps, offset=config.norm_offset)
        self.input_norm = norm(f"{source}.input_layernorm")
        self.attention = attention or Attention(
            f"{source}.self_attn",
            f"layers.{index}",
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            window=config.windows[index],
            norm_eps=config.norm_eps if config.qk_norm else None,
            norm_offset=config.norm_offset,
            sinks=config.sinks,
            output_gate=config.output_gate,
        )
        self.mlp_norm = norm(f"{source}.post_attention_layernorm")
        self.mlp = mlp or GatedMLP(
            f"{source}.mlp",
            config.hidden,
            config.intermediate,
            bias=config.mlp_bias,
            activation=config.activation,
        )

    def forward(self, x_TC: torch.Tensor, rows_TQ: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        x_TC = elementwise.add(self.attention(self.input_norm(x_TC), rows_TQ, inputs), x_TC)
        return elementwise.add(self.mlp(self.mlp_norm(x_TC), inputs), x_TC)


class Decoder(nn.Module):
    """An embedding, layers, a norm and a vocabulary projection: a Model of graphs/models/family.py.

    Args:
        context_len: the plan's, which rotary tables are as long as.
        activation: dtype of everything between the embedding and the logits.
        layer: makes the layer of an index. Called with the residual stream, what ``rope`` gives, and the inputs;
            has ``attention`` with ``kv_parts``, and its ``group`` where that is not the first.
        rope: of the inputs, what layers turn queries and keys by; None is one table or base for all.
        norm: makes the last norm, of a checkpoint prefix and a width; None is that of the layers.
        embedding_scale: what embeddings are multiplied by, rounded to ``activation`` as transformers rounds it;
            None leaves them as they are.
        embedding, last_norm, head: their names in the checkpoint.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        context_len: int,
        activation: str,
        layer: Callable[[DecoderConfig, int], nn.Module] = DecoderLayer,
        rope: nn.Module | None = None,
        norm: Callable[[str, int, float], nn.Module] | None = None,
        embedding_scale: float | None = None,
        embedding: str = "model.embed_tokens.weight",
        last_norm: str = "model.norm",
        head: str = "lm_head.weight",
    ) -> None:
        super().__init__()
        self.config = config
        self.activation = activation
        self.embedding_scale = embedding_scale
        if embedding_scale is not None:
            self.embedding_scale = torch.tensor(embedding_scale, dtype=getattr(torch, activation)).item()
        shape = (config.vocabulary, config.hidden)
        self.embedding = parameter(shape, embedding, shard=BY_OUTPUTS)
        self.rope = rope or RotaryRows(config.rope, config.rotary_dim, context_len)
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.layers))
        make = norm or functools.partial(RMSNorm, offset=config.norm_offset)
        self.norm = make(last_norm, config.hidden, config.norm_eps)
        source = embedding if config.tied_embeddings else head
        self.head = parameter(shape, source, shard=BY_OUTPUTS, quantizable=True)

    def cache_groups(self, page_size: int, dtype: str, state_dtype: str) -> tuple[CacheGroup, ...]:
        """Keys and values of all layers in one group, which keeps everything; states of others in one behind it."""
        parts: dict[str, list[KVPart]] = {"kv": [], STATE: []}
        for layer in self.layers:
            attention: Any = layer.attention
            group = getattr(attention, "group", "") or "kv"
            parts[group] += attention.kv_parts(page_size, state_dtype if group == STATE else dtype)
        units = {"kv": page_size, STATE: None}
        return tuple(CacheGroup(name, tuple(some), units[name]) for name, some in parts.items() if some)

    def forward(self, ids_T: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        x_TC = embeddings.embedding(ids_T, self.embedding, out_dtype=self.activation)
        if self.embedding_scale is not None:
            x_TC = elementwise.scale(x_TC, by=self.embedding_scale)
        turns = self.rope(inputs)
        for layer in self.layers:
            x_TC = layer(x_TC, turns, inputs)
        return gemm.linear(self.norm(x_TC), self.head, out_dtype="float32")


def dense(config: Mapping[str, Any], **overrides: Any) -> DecoderConfig:
    """The part of a normalised config that dense decoders read alike; ``overrides`` is what a family knows better.

    Raises:
        UnsupportedModelError: unknown activation function.
    """
    act = config["hidden_act"]
    if act not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {act!r} is not supported; dense decoders use {' or '.join(map(repr, ACTIVATIONS))}"
        )
    rope = dict(config["rope_parameters"])
    if rope.get("rope_type") == "dynamic":  # its scale starts where the config's context ends
        rope["original_max_position_embeddings"] = config["max_position_embeddings"]
    elif rope.get("rope_type") == "yarn":
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    fields: dict[str, Any] = {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "vocabulary": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope": rope,
        "windows": windows(config),
        "tied_embeddings": config["tie_word_embeddings"],
        "activation": ACTIVATIONS[act],
    }
    return DecoderConfig(**(fields | overrides))
