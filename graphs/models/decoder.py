"""The dense decoder that Llama, Mistral, Qwen2, Qwen3 and their relatives are instances of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from makeready.graphs.layers.attention import Attention
from makeready.graphs.layers.dense import BY_OUTPUTS, GatedMLP, RMSNorm
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import parameter
from makeready.graphs.layers.rope import RotaryRows
from makeready.graphs.spec import CacheGroup, KVPart
from makeready.kernels import elementwise, embedding
from makeready.kernels.gemm import linear as gemm


@dataclass(frozen=True)
class DecoderConfig:
    """What sets one dense decoder apart from another.

    Attributes:
        windows: tokens that a token of each layer sees, itself included; 0 for all.
        qk_norm: whether queries and keys are normalised per head before rotation.
        rope: normalised ``rope_parameters``, complete with what the type needs.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norm_eps: float
    context_len: int
    rope: Mapping[str, Any]
    windows: tuple[int, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        source = f"model.layers.{index}"
        self.input_norm = RMSNorm(f"{source}.input_layernorm", config.hidden, config.norm_eps)
        self.attention = Attention(
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
        )
        self.mlp_norm = RMSNorm(f"{source}.post_attention_layernorm", config.hidden, config.norm_eps)
        self.mlp = GatedMLP(f"{source}.mlp", config.hidden, config.intermediate, bias=config.mlp_bias)

    def forward(self, x_TC: torch.Tensor, rows_TQ: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        x_TC = elementwise.add(self.attention(self.input_norm(x_TC), rows_TQ, inputs), x_TC)
        return elementwise.add(self.mlp(self.mlp_norm(x_TC)), x_TC)


class Decoder(nn.Module):
    """Token ids ``[T]`` to the logits of the token behind each, ``[T, vocabulary]`` float32.

    ``context_len`` is the plan's, which rotary tables are as long as; ``activation`` names the dtype of
    everything between the embedding and the logits.
    """

    def __init__(self, config: DecoderConfig, *, context_len: int, activation: str) -> None:
        super().__init__()
        self.config = config
        self.activation = activation
        shape = (config.vocabulary, config.hidden)
        self.embedding = parameter(shape, "model.embed_tokens.weight", shard=BY_OUTPUTS)
        self.rope = RotaryRows(config.rope, config.rotary_dim, context_len)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.layers))
        self.norm = RMSNorm("model.norm", config.hidden, config.norm_eps)
        source = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
        self.head = parameter(shape, source, shard=BY_OUTPUTS, quantizable=True)

    def kv_parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        """Cache tensors of all layers, in layer order."""
        return tuple(
            part
            for layer in self.layers
            for part in layer.attention.kv_parts(page_size, dtype)  # type: ignore[union-attr]
        )

    def cache_groups(self, page_size: int, dtype: str) -> tuple[CacheGroup, ...]:
        """All layers in one group, which keeps everything."""
        return (CacheGroup("kv", self.kv_parts(page_size, dtype), page_size),)

    def forward(self, ids_T: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        x_TC = embedding.embedding(ids_T, self.embedding, out_dtype=self.activation)
        rows_TQ = self.rope(inputs)
        for layer in self.layers:
            x_TC = layer(x_TC, rows_TQ, inputs)
        return gemm.linear(self.norm(x_TC), self.head, out_dtype="float32")
