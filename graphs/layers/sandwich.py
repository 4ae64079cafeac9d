"""Layers with a norm before and after attention and MLP, and rotary rows by kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.rope import RotaryRows
from makeready.kernels import elementwise


class SandwichLayer(nn.Module):
    """``x + after(attention(before(x)))``, then the same with the MLP.

    Args:
        kind: of the rotary rows that its attention takes.
        norm: makes the norm of a checkpoint prefix.
    """

    def __init__(
        self,
        source: str,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        kind: str,
        norm: Callable[[str], nn.Module],
    ) -> None:
        super().__init__()
        self.kind = kind
        self.input_norm = norm(f"{source}.input_layernorm")
        self.attention = attention
        self.attention_norm = norm(f"{source}.post_attention_layernorm")
        self.mlp_norm = norm(f"{source}.pre_feedforward_layernorm")
        self.mlp = mlp
        self.output_norm = norm(f"{source}.post_feedforward_layernorm")

    def forward(self, x_TC: torch.Tensor, rows: Mapping[str, torch.Tensor], inputs: Inputs) -> torch.Tensor:
        attended = self.attention(self.input_norm(x_TC), rows[self.kind], inputs)
        x_TC = elementwise.add(self.attention_norm(attended), x_TC)
        return elementwise.add(self.output_norm(self.mlp(self.mlp_norm(x_TC))), x_TC)


class RotaryRowsByKind(nn.Module):
    """``rows[T, rotary_dim]`` of each kind of layer, which rotates by settings of its own."""

    def __init__(
        self, parameters: Mapping[str, Mapping[str, Any]], rotary_dim: int, context_len: int
    ) -> None:
        super().__init__()
        self.kinds = nn.ModuleDict({k: RotaryRows(p, rotary_dim, context_len) for k, p in parameters.items()})

    def forward(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        return {kind: rows(inputs) for kind, rows in self.kinds.items()}
