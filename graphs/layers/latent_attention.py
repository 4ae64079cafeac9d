"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) over the paged cache.

letters as in :mod:`makeready.kernels.attention.mla`; C hidden
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from makeready.graphs.layers.dense import BY_INPUTS, BY_OUTPUTS, Linear, RMSNorm
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import Parameter, parameter
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.recipe import Each, Piece
from makeready.graphs.plan.spec import KVPart
from makeready.kernels.attention import mla, mla_scaled
from makeready.kernels.attention.formats import PER_TOKEN_HEAD
from makeready.kernels.attention.mla_attention import mla_attention

WHOLE = (None, None)  # latents are every head's, so all ranks have what makes them


@dataclass(frozen=True)
class LatentConfig:
    """What sets one model's latent attention apart from another's.

    Attributes:
        q_rank: features that queries are squeezed to before they are made; 0 where they are made of the stream.
        rank: normed features of a latent.
        nope, rope: features of a head's queries and keys that are not rotated, and that are.
        value: features of a head's values.
        scale: of the scores.
        interleaved: whether features 2i and 2i + 1 turn together, not i and i + rope/2.
        bias: whether the projections from and to the stream have biases.
        split: whether the checkpoint has what makes keys and values of latents as two tensors,
            ``k_b_proj[heads, rank, nope]`` and ``v_b_proj[heads, value, rank]``, not as one.
        norm_eps: epsilon of the norms of latents and of squeezed queries.
    """

    hidden: int
    heads: int
    q_rank: int
    rank: int
    nope: int
    rope: int
    value: int
    scale: float
    interleaved: bool = True
    bias: bool = False
    split: bool = False
    norm_eps: float = 1e-6


class LatentAttention(nn.Module):
    """Attention whose keys and values are made of one latent a token.

    Args:
        source: checkpoint prefix, ``model.layers.3.self_attn``.
        name: prefix of its cache tensors, ``layers.3``.
        activation: the plan's dtype of activations, which ``kv_b`` is kept in: attention multiplies by it in
            more than one way, so no quantization applies.
    """

    def __init__(self, source: str, name: str, config: LatentConfig, *, activation: str) -> None:
        super().__init__()
        self.config = c = config
        self.name, self.activation = name, activation
        queries = c.heads * (c.nope + c.rope)
        if c.q_rank:
            self.q_a = Linear(f"{source}.q_a_proj", c.q_rank, c.hidden, bias=c.bias, shard=WHOLE)
            self.q_norm = RMSNorm(f"{source}.q_a_layernorm", c.q_rank, c.norm_eps)
            self.q = Linear(f"{source}.q_b_proj", queries, c.q_rank, bias=False, shard=BY_OUTPUTS)
        else:
            self.q = Linear(f"{source}.q_proj", queries, c.hidden, bias=False, shard=BY_OUTPUTS)
        latent = f"{source}.kv_a_proj_with_mqa"
        self.kv_a = Linear(latent, c.rank + c.rope, c.hidden, bias=c.bias, shard=WHOLE)
        self.kv_norm = parameter((c.rank,), f"{source}.kv_a_layernorm.weight")
        self.kv_b = _kv_b(source, c, activation)
        self.o = Linear(f"{source}.o_proj", c.hidden, c.heads * c.value, bias=c.bias, shard=BY_INPUTS)

    def kv_parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        """The layer's cache: latents, without heads; in 8 bits with a scale for each token, rotated features apart.

        Raises:
            UnsupportedModelError: 4 bits were asked for.
        """
        rank, rope, found = self.config.rank, self.config.rope, PER_TOKEN_HEAD.get(dtype)
        if found is None:
            return (KVPart(f"{self.name}.latent", (page_size, rank + rope), dtype),)
        if found.bits != 8:
            raise UnsupportedModelError(
                f"kv.dtype={dtype} is for keys and values of heads, and this model caches latents; choose "
                "kv.dtype=int8_per_token_head or fp8_per_token_head, which keep them in 8 bits"
            )
        return (
            KVPart(f"{self.name}.latent", (page_size, rank), found.dtype),
            KVPart(f"{self.name}.rope", (page_size, rope), self.activation),
            KVPart(f"{self.name}.scales", (page_size, 1), "float32"),
        )

    def forward(self, x_TC: torch.Tensor, rows_TQ: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        c, cache = self.config, [inputs.kv(f"{self.name}.latent")]
        write, attention = mla.mla_write, mla_attention
        if any(part.name == f"{self.name}.scales" for part in inputs.cache.parts):
            cache += [inputs.kv(f"{self.name}.{part}") for part in ("rope", "scales")]
            write, attention = mla_scaled.mla_write_scaled, mla_scaled.mla_attention_scaled
        # Queries first: their rows are whole 8-bit blocks, behind which those of latents merge.
        q = self.q(self.q_norm(self.q_a(x_TC)) if c.q_rank else x_TC)
        kv = self.kv_a(x_TC)
        latent = write(
            kv, rows_TQ, self.kv_norm, inputs.kv_slot, *cache,
            rank=c.rank, rope=c.rope, eps=c.norm_eps, interleaved=c.interleaved,
        )  # fmt: skip
        y = attention(
            q, latent, self.kv_b, rows_TQ, *cache,
            inputs.page_table, inputs.query_start, inputs.query_len, inputs.context_len,
            heads=c.heads, nope=c.nope, rope=c.rope, value=c.value, rank=c.rank,
            scale=c.scale, interleaved=c.interleaved,
        )  # fmt: skip
        return self.o(y)


def _kv_b(source: str, c: LatentConfig, dtype: str) -> Parameter:
    """``[heads * (nope + value), rank]``: of every head what makes keys, then what makes values."""
    rows = c.nope + c.value
    shape = (c.heads * rows, c.rank)
    if not c.split:
        name = f"{source}.kv_b_proj.weight"
        return parameter(shape, name, shard=BY_OUTPUTS, quantizable=True, dtype=dtype)
    head = (Each("h", c.heads, source=(1, 0, 0), place=(rows, 0)),)
    keys = Piece(
        f"{source}.k_b_proj.weight", ((0, 1), (0, c.rank), (0, c.nope)), (0, 0), axes=(2, 1), each=head
    )
    values = Piece(
        f"{source}.v_b_proj.weight", ((0, 1), (0, c.value), (0, c.rank)), (c.nope, 0), axes=(1, 2), each=head
    )
    return parameter(shape, (keys, values), shard=BY_OUTPUTS, dtype=dtype)
