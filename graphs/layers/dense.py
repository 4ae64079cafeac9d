"""Layers without state: projections, norms, the gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import TENSOR_PARALLEL, Shard, parameter
from makeready.graphs.plan.recipe import Each, Piece
from makeready.kernels import elementwise, norm
from makeready.kernels.gemm import linear as gemm

BY_OUTPUTS: Shard = (TENSOR_PARALLEL, None)  # of a weight [outputs, inputs]
BY_INPUTS: Shard = (None, TENSOR_PARALLEL)


@dataclass(frozen=True)
class Rows:
    """Rows of a projection that a checkpoint stores among others: ``count`` from ``first`` on, repeated ``times``.

    Attributes:
        source: the projection's prefix.
        step: rows from one repetition to the next.
    """

    source: str
    count: int
    first: int = 0
    times: int = 1
    step: int = 0

    def piece(self, leaf: str, inputs: tuple[int, ...], at: int) -> Piece:
        """These rows of the tensor ``leaf``, from row ``at`` on; its other axes are ``inputs``."""
        still = tuple(0 for _ in inputs)
        each = (Each("part", self.times, source=(self.step, *still), place=(self.count, *still)),)
        box = ((self.first, self.first + self.count), *((0, n) for n in inputs))
        return Piece(f"{self.source}.{leaf}", box, (at, *still), each=each if self.times > 1 else ())


class Linear(nn.Module):
    """``x[T, inputs] -> y[T, outputs]``; ``shard`` names the mesh axes of the weight's two axes.

    ``source`` is the projection's prefix in the checkpoint, or the rows that it is put together of, in order.
    """

    def __init__(
        self,
        source: str | Sequence[Rows],
        outputs: int,
        inputs: int,
        *,
        bias: bool,
        shard: Shard,
        quantizable: bool = True,
    ) -> None:
        super().__init__()
        rows = (Rows(source, outputs),) if isinstance(source, str) else tuple(source)
        weight, shift, at = [], [], 0
        for some in rows:
            weight.append(some.piece("weight", (inputs,), at))
            shift.append(some.piece("bias", (), at))
            at += some.count * some.times
        assert at == outputs, f"{rows} are {at} rows, the projection has {outputs}"
        self.weight = parameter((outputs, inputs), weight, shard=shard, quantizable=quantizable)
        self.bias = parameter((outputs,), shift, shard=shard[:1]) if bias else None

    def forward(self, x_TK: torch.Tensor, out_dtype: str = "") -> torch.Tensor:
        return gemm.linear(x_TK, self.weight, self.bias, out_dtype=out_dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm of ``x[T, C]``; ``offset`` is added to the weights as they are stored."""

    def __init__(self, source: str, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = parameter((width,), f"{source}.weight")

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return norm.rms_norm(x_TC, self.weight, eps=self.eps, offset=self.offset)


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``; ``names`` are those of gate, up and down in the checkpoint."""

    def __init__(
        self,
        source: str,
        hidden: int,
        intermediate: int,
        *,
        bias: bool,
        activation: Callable[[torch.Tensor], torch.Tensor] = elementwise.silu,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.activation = activation
        gate, up, down = (f"{source}.{name}" for name in names)
        self.gate = Linear(gate, intermediate, hidden, bias=bias, shard=BY_OUTPUTS)
        self.up = Linear(up, intermediate, hidden, bias=bias, shard=BY_OUTPUTS)
        self.down = Linear(down, hidden, intermediate, bias=bias, shard=BY_INPUTS)

    def forward(self, x_TC: torch.Tensor, inputs: Inputs | None = None) -> torch.Tensor:
        """``inputs`` are there for other blocks in an MLP's place, which depend on the step."""
        return self.down(elementwise.multiply(self.activation(self.gate(x_TC)), self.up(x_TC)))
