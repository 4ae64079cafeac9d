"""Layers without state: projections, norms, the gated MLP."""

from __future__ import annotations

import torch
from torch import nn

from makeready.graphs.layers.parameter import parameter
from makeready.kernels import elementwise, norm
from makeready.kernels.gemm import linear as gemm


class Linear(nn.Module):
    """``x[T, inputs] -> y[T, outputs]``.

    ``shard`` is the weight's axis that tensor parallelism splits: 0 splits the outputs, 1 the inputs.
    """

    def __init__(self, source: str, outputs: int, inputs: int, *, bias: bool, shard: int) -> None:
        super().__init__()
        self.weight = parameter((outputs, inputs), f"{source}.weight", shard=shard, quantizable=True)
        self.bias = parameter((outputs,), f"{source}.bias", shard=0 if shard == 0 else None) if bias else None

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return gemm.linear(x_TK, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm of ``x[T, C]``."""

    def __init__(self, source: str, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((width,), f"{source}.weight")

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return norm.rms_norm(x_TC, self.weight, eps=self.eps)


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, source: str, hidden: int, intermediate: int, *, bias: bool) -> None:
        super().__init__()
        self.gate = Linear(f"{source}.gate_proj", intermediate, hidden, bias=bias, shard=0)
        self.up = Linear(f"{source}.up_proj", intermediate, hidden, bias=bias, shard=0)
        self.down = Linear(f"{source}.down_proj", hidden, intermediate, bias=bias, shard=1)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.down(elementwise.multiply(elementwise.silu(self.gate(x_TC)), self.up(x_TC)))
