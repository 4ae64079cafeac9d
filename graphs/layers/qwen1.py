"""What is Qwen 1's own: one projection for q, k and v, and queries that are scaled with their position."""

from __future__ import annotations

import torch
from torch import nn

from makeready.graphs.layers.attention import PagedCache
from makeready.graphs.layers.dense import BY_INPUTS, BY_OUTPUTS, Linear
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.rope import RotaryRows
from makeready.graphs.plan.spec import KVPart
from makeready.kernels import elementwise, rope


class PromptRotaryRows(nn.Module):
    """Rotary rows of keys and of queries, each ``[T, rotary_dim]``.

    Args:
        context_len: the plan's, which a table of fixed rows is as long as.
        original_context: tokens that the model was trained on.
        dynamic: whether the base grows with the prompt; see ``kernels.rope.rope_rows_stepped``.
        logn: whether queries are scaled; see ``kernels.rope.rope_rows_logn``.
    """

    def __init__(
        self,
        rotary_dim: int,
        theta: float,
        *,
        context_len: int,
        original_context: int,
        dynamic: bool,
        logn: bool,
    ) -> None:
        super().__init__()
        self.rotary_dim, self.theta, self.original_context = rotary_dim, theta, original_context
        self.logn = logn
        fixed = {"rope_type": "default", "rope_theta": theta}
        self.fixed = None if dynamic else RotaryRows(fixed, rotary_dim, context_len)

    def forward(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fixed is not None:
            rows = self.fixed(inputs)
        else:
            rows = rope.rope_rows_stepped(
                inputs.positions,
                inputs.token_slot,
                inputs.prompt_len,
                rotary_dim=self.rotary_dim,
                theta=self.theta,
                original_context=self.original_context,
            )
        if not self.logn:
            return rows, rows
        return rows, rope.rope_rows_logn(rows, inputs.positions, original_context=self.original_context)


class FusedAttention(nn.Module):
    """Multi-head attention whose checkpoint has q, k and v in one matrix ``c_attn`` with a bias."""

    def __init__(self, source: str, name: str, *, hidden: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.hidden, self.heads, self.head_dim = hidden, heads, hidden // heads
        self.cache = PagedCache(name, heads, heads, self.head_dim)
        self.qkv = Linear(f"{source}.c_attn", 3 * hidden, hidden, bias=True, shard=BY_OUTPUTS)
        self.o = Linear(f"{source}.c_proj", hidden, hidden, bias=bias, shard=BY_INPUTS)

    def kv_parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        """The layer's cache tensors."""
        return self.cache.parts(page_size, dtype)

    def forward(
        self, x_TC: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], inputs: Inputs
    ) -> torch.Tensor:
        key_rows, query_rows = rows
        qkv, width = self.qkv(x_TC), self.hidden
        q, k, v = (elementwise.columns(qkv, start=i * width, stop=(i + 1) * width) for i in range(3))
        q = rope.rope(q, query_rows, heads=self.heads, head_dim=self.head_dim)
        k = rope.rope(k, key_rows, heads=self.heads, head_dim=self.head_dim)
        return self.o(self.cache.attend(q, k, v, inputs))


class Qwen1Layer(nn.Module):
    """Pre-norm attention, then pre-norm MLP, each added to the residual stream."""

    def __init__(
        self, attention_norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.input_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(
        self, x_TC: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], inputs: Inputs
    ) -> torch.Tensor:
        x_TC = elementwise.add(self.attention(self.input_norm(x_TC), rows, inputs), x_TC)
        return elementwise.add(self.mlp(self.mlp_norm(x_TC)), x_TC)
