"""Rotary rows of a step's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import constant
from makeready.kernels import rope


class RotaryRows(nn.Module):
    """``rows[T, rotary_dim]`` under any of the rope types; see kernels/rope.py for what a row holds."""

    def __init__(self, parameters: Mapping[str, Any], rotary_dim: int, context_len: int) -> None:
        super().__init__()
        self.parameters_ = dict(parameters)
        self.rotary_dim = rotary_dim
        self.table = None
        if parameters["rope_type"] != "dynamic":
            arguments = {"context_len": context_len, "rotary_dim": rotary_dim, "rope": dict(parameters)}
            self.table = constant((context_len, rotary_dim), "rope_table", arguments)

    def forward(self, inputs: Inputs) -> torch.Tensor:
        if self.table is not None:
            return rope.rope_rows(inputs.positions, self.table)
        return rope.rope_rows_dynamic(
            inputs.positions,
            inputs.token_slot,
            inputs.prompt_len,
            rotary_dim=self.rotary_dim,
            theta=float(self.parameters_["rope_theta"]),
            factor=float(self.parameters_["factor"]),
            original_context=int(self.parameters_["original_max_position_embeddings"]),
        )
