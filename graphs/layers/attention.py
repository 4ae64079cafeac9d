"""Self-attention over the paged cache."""

from __future__ import annotations

import torch
from torch import nn

from makeready.graphs.layers.dense import BY_INPUTS, BY_OUTPUTS, Linear, Rows
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import parameter
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import KVPart
from makeready.kernels import elementwise, norm, rope
from makeready.kernels.attention import paged, scaled, tree
from makeready.kernels.attention.formats import PER_TOKEN_HEAD


class PagedCache:
    """A layer's keys and values in pages, and attention over them.

    Where the cache is one of :data:`~makeready.kernels.attention.formats.PER_TOKEN_HEAD`, a third tensor of the same
    pages has the scales.

    Args:
        name: prefix of the cache tensors, ``layers.3``.
        window: tokens that a token sees, itself included; 0 for all.
        scale: of the scores; None is ``head_dim ** -0.5``.
    """

    def __init__(
        self,
        name: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int = 0,
        scale: float | None = None,
    ) -> None:
        self.name = name
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.window = window
        self.scale = head_dim**-0.5 if scale is None else scale

    def parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        """The cache tensors."""
        found = PER_TOKEN_HEAD.get(dtype)
        if found is None:
            shape = (page_size, self.kv_heads, self.head_dim)
            return KVPart(f"{self.name}.k", shape, dtype), KVPart(f"{self.name}.v", shape, dtype)
        shape = (page_size, self.kv_heads, found.row_bytes(self.head_dim))
        scales = (page_size, self.kv_heads, found.scales)
        return (
            KVPart(f"{self.name}.k", shape, found.dtype),
            KVPart(f"{self.name}.v", shape, found.dtype),
            KVPart(f"{self.name}.scales", scales, "float16"),
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        inputs: Inputs,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Put keys and values ``[T, kv_heads * head_dim]`` into the cache and attend with ``q`` over it.

        ``sinks[heads]`` join the denominators of softmaxes.
        """
        caches = [inputs.kv(f"{self.name}.k"), inputs.kv(f"{self.name}.v")]
        sizes = {"kv_heads": self.kv_heads, "head_dim": self.head_dim}
        write, attention = paged.kv_write, paged.paged_attention
        scales = next((part for part in inputs.cache.parts if part.name == f"{self.name}.scales"), None)
        if scales is not None:
            caches.append(inputs.kv(scales.name))
            sizes["bits"] = 16 // scales.page_shape[-1]
            write, attention = scaled.kv_write_scaled, scaled.paged_attention_scaled
        write(k, v, inputs.kv_slot, *caches, **sizes)
        if inputs.deep:
            return self._attend_trees(q, caches, inputs, sinks)
        return attention(
            q,
            *caches,
            inputs.page_table,
            inputs.query_start,
            inputs.query_len,
            inputs.context_len,
            sinks,
            heads=self.heads,
            scale=self.scale,
            window=self.window,
            **sizes,
        )

    def _attend_trees(
        self, q: torch.Tensor, caches: list[torch.Tensor], inputs: Inputs, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        if 0 < self.window <= inputs.deep:
            raise PlanError(
                f"speculative.tree is {inputs.deep} levels deep, and {self.name} has a window of {self.window} "
                "tokens; make it less deep"
            )
        return tree.tree_attention(
            q,
            *caches,
            inputs.page_table,
            inputs.query_start,
            inputs.query_len,
            inputs.context_len,
            inputs.positions,
            inputs.tree_start,
            inputs.visible,
            sinks,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            window=self.window,
        )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, optional head norms and sliding window.

    Args:
        source: checkpoint prefix, ``model.layers.3.self_attn``.
        name: prefix of its cache tensors, ``layers.3``.
        window: tokens that a token sees, itself included; 0 for all.
        group: cache group of its tensors; empty for the model's first.
        norm_eps: epsilon of the per-head query and key norms, or None where the model has none.
        norm_offset: added to the weights of these norms.
        scale: of the scores; None is ``head_dim ** -0.5``.
        sinks: whether each head has a learned logit that joins the denominators of its softmaxes.
        output_gate: whether what heads give is multiplied by the sigmoid of a projection, whose rows the checkpoint
            has behind those of each head's query.
        inputs: features that queries, keys and values are made of; None for ``hidden``.
    """

    def __init__(
        self,
        source: str,
        name: str,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool,
        window: int = 0,
        norm_eps: float | None = None,
        norm_offset: float = 0.0,
        scale: float | None = None,
        group: str = "",
        sinks: bool = False,
        output_gate: bool = False,
        inputs: int | None = None,
    ) -> None:
        super().__init__()
        inputs = hidden if inputs is None else inputs
        self.group = group
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.cache = PagedCache(name, heads, kv_heads, head_dim, window=window, scale=scale)
        self.norm_eps, self.norm_offset = norm_eps, norm_offset
        q = f"{source}.q_proj"
        per_head = [Rows(q, head_dim, first, heads, 2 * head_dim) for first in (0, head_dim)]
        self.q = Linear(
            per_head[:1] if output_gate else q, heads * head_dim, inputs, bias=qkv_bias, shard=BY_OUTPUTS
        )
        self.k = Linear(f"{source}.k_proj", kv_heads * head_dim, inputs, bias=qkv_bias, shard=BY_OUTPUTS)
        self.v = Linear(f"{source}.v_proj", kv_heads * head_dim, inputs, bias=qkv_bias, shard=BY_OUTPUTS)
        self.gate = (
            Linear(per_head[1:], heads * head_dim, inputs, bias=qkv_bias, shard=BY_OUTPUTS)
            if output_gate
            else None
        )
        self.o = Linear(f"{source}.o_proj", hidden, heads * head_dim, bias=output_bias, shard=BY_INPUTS)
        self.sinks = (
            parameter((heads,), f"{source}.sinks", shard=BY_OUTPUTS[:1], dtype="float32") if sinks else None
        )
        if norm_eps is not None:
            self.q_norm = parameter((head_dim,), f"{source}.q_norm.weight")
            self.k_norm = parameter((head_dim,), f"{source}.k_norm.weight")

    def kv_parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        """The layer's cache tensors."""
        return self.cache.parts(page_size, dtype)

    def forward(self, x_TC: torch.Tensor, rows_TQ: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        inputs = inputs.of(self.group)
        q, k, v = self.q(x_TC), self.k(x_TC), self.v(x_TC)
        gate = self.gate(x_TC) if self.gate is not None else None
        if self.norm_eps is not None:
            by = {"eps": self.norm_eps, "offset": self.norm_offset, "head_dim": self.head_dim}
            q = norm.head_rms_norm(q, self.q_norm, heads=self.heads, **by)
            k = norm.head_rms_norm(k, self.k_norm, heads=self.kv_heads, **by)
        q = rope.rope(q, rows_TQ, heads=self.heads, head_dim=self.head_dim)
        k = rope.rope(k, rows_TQ, heads=self.kv_heads, head_dim=self.head_dim)
        y = self.cache.attend(q, k, v, inputs, self.sinks)
        return self.o(y if gate is None else elementwise.sigmoid_mul(y, gate))
