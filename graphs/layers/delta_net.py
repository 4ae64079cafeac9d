"""Gated delta net (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464): a recurrence in the place of attention.

T tokens, C hidden, K taps of the convolution, Hk and Hv heads of keys and values, Dk and Dv features of each
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from makeready.graphs.layers.dense import BY_INPUTS, BY_OUTPUTS, Linear, Rows
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import parameter
from makeready.graphs.plan.recipe import Piece
from makeready.graphs.plan.spec import KVPart
from makeready.kernels import norm
from makeready.kernels.delta import conv, rule

STATE = "state"  # the cache group of what such layers keep of a sequence


@dataclass(frozen=True)
class DeltaNetConfig:
    """Sizes, and how the checkpoint stores what a token is projected to.

    Attributes:
        taps: tokens that the convolution sees, the last one included.
        interleaved: whether ``in_proj_qkvz`` and ``in_proj_ba`` have key head after key head, each with what its
            value heads take (Qwen3-Next); else there are ``in_proj_qkv``, ``_z``, ``_b`` and ``_a``.
    """

    hidden: int
    taps: int
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    norm_eps: float
    interleaved: bool


class GatedDeltaNet(nn.Module):
    """Queries, keys and values through a short convolution, the gated delta rule, a gated norm and a projection.

    Args:
        source: checkpoint prefix, ``model.layers.3.linear_attn``.
        name: prefix of its cache tensors, ``layers.3``.
        activation: dtype of what the convolution keeps.
    """

    group = STATE

    def __init__(self, source: str, name: str, config: DeltaNetConfig, *, activation: str) -> None:
        super().__init__()
        self.name, self.config, self.activation = name, config, activation
        c, hidden = config, config.hidden
        keys, values = c.key_heads * c.key_dim, c.value_heads * c.value_dim
        self.width = 2 * keys + values
        qkv, z, ba = _rows(source, c)
        self.qkv = Linear(qkv, self.width, hidden, bias=False, shard=BY_OUTPUTS)
        self.z = Linear(z, values, hidden, bias=False, shard=BY_OUTPUTS)
        self.ba = Linear(ba, 2 * c.value_heads, hidden, bias=False, shard=BY_OUTPUTS, quantizable=False)
        taps = Piece(f"{source}.conv1d.weight", ((0, self.width), (0, 1), (0, c.taps)), (0, 0), axes=(2, 0))
        self.conv = parameter((c.taps, self.width), (taps,), shard=BY_INPUTS, dtype="float32")
        self.a_log = parameter((c.value_heads,), f"{source}.A_log", shard=BY_OUTPUTS[:1], dtype="float32")
        self.dt_bias = parameter((c.value_heads,), f"{source}.dt_bias", shard=BY_OUTPUTS[:1], dtype="float32")
        self.norm = parameter((c.value_dim,), f"{source}.norm.weight")
        self.out = Linear(f"{source}.out_proj", hidden, values, bias=False, shard=BY_INPUTS)

    def kv_parts(self, page_size: int, dtype: str) -> tuple[KVPart, KVPart]:
        """The last inputs of the convolution, and the states of the heads, which ``dtype`` is of."""
        c = self.config
        return (
            KVPart(f"{self.name}.conv", (c.taps - 1, self.width), self.activation),
            KVPart(f"{self.name}.state", (c.value_heads, c.key_dim, c.value_dim), dtype),
        )

    def forward(self, x_TC: torch.Tensor, turns: object, inputs: Inputs) -> torch.Tensor:
        """``turns`` is what attention turns its queries and keys by; there are no positions here."""
        c, i = self.config, inputs.of(self.group)
        rows = (i.state_in, i.state_out, i.query_start, i.query_len)
        qkv, z, ba = self.qkv(x_TC), self.z(x_TC), self.ba(x_TC, out_dtype="float32")
        mixed = conv.causal_conv_silu(qkv, self.conv, i.kv(f"{self.name}.conv"), *rows)
        y = rule.gated_delta_rule(
            mixed, ba, self.a_log, self.dt_bias, i.kv(f"{self.name}.state"), *rows,
            key_heads=c.key_heads, key_dim=c.key_dim, value_heads=c.value_heads, value_dim=c.value_dim,
        )  # fmt: skip
        y = norm.gated_head_rms_norm(
            y, z, self.norm, eps=c.norm_eps, heads=c.value_heads, head_dim=c.value_dim
        )
        return self.out(y)


def _rows(source: str, c: DeltaNetConfig) -> tuple[list[Rows], list[Rows], list[Rows]]:
    """Of q, k and v one behind the other, of z, and of b and a."""
    keys, values = c.key_heads * c.key_dim, c.value_heads * c.value_dim
    if not c.interleaved:
        ba = [Rows(f"{source}.in_proj_{name}", c.value_heads) for name in ("b", "a")]
        return [Rows(f"{source}.in_proj_qkv", 2 * keys + values)], [Rows(f"{source}.in_proj_z", values)], ba
    own, heads = values // c.key_heads, c.value_heads // c.key_heads  # of a key head
    step = 2 * (c.key_dim + own)
    qkvz, at = [], 0
    for count in (c.key_dim, c.key_dim, own, own):
        qkvz.append(Rows(f"{source}.in_proj_qkvz", count, at, c.key_heads, step))
        at += count
    ba = [Rows(f"{source}.in_proj_ba", heads, first, c.key_heads, 2 * heads) for first in (0, heads)]
    return qkvz[:3], qkvz[3:], ba
