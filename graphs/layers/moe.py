"""Mixture of experts: every token goes through a few of many MLPs, and through a shared one where there is one.

T tokens, E experts, k experts of a token, C hidden, I features of an expert
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from makeready.graphs.layers.dense import GatedMLP
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import EXPERT_PARALLEL, parameter
from makeready.graphs.models.family import ExpertNames
from makeready.graphs.plan.recipe import Each, Piece
from makeready.kernels import elementwise
from makeready.kernels.gemm import linear as gemm
from makeready.kernels.moe import experts as products
from makeready.kernels.moe import route as routing

BY_EXPERTS = (EXPERT_PARALLEL, None, None)


@dataclass(frozen=True)
class Routing:
    """How a token's experts are chosen and weighted: attributes of :func:`makeready.kernels.moe.route.route`."""

    top_k: int
    score: str = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_members: int = 1


@dataclass(frozen=True)
class ExpertsConfig:
    """What sets one mixture apart from another.

    Attributes:
        correction: the checkpoint's name, within the module, of numbers that are added to scores when experts are
            chosen; empty for none.
        shared: the shared MLP's name within the module, and its features; none where these are 0.
        shared_gate: the name of the projection whose sigmoid the shared MLP is multiplied by; empty for none.
        bias: whether the router and all projections of experts have biases.
        activation: makes of gate and up side by side what the last projection takes.
    """

    experts: int
    intermediate: int
    routing: Routing
    names: ExpertNames
    correction: str = ""
    shared: str = ""
    shared_intermediate: int = 0
    shared_gate: str = ""
    bias: bool = False
    activation: Callable[[torch.Tensor], torch.Tensor] = elementwise.silu_mul


class MixtureOfExperts(nn.Module):
    """``sum of weight_i * mlp_i(x)`` over a token's experts, plus the shared MLP.

    Args:
        layer: the layer's name in the checkpoint.
        hidden: C.
    """

    def __init__(self, layer: str, hidden: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        names, source = config.names, f"{layer}.{config.names.module}"
        count, width = config.experts, config.intermediate
        self.router = parameter((count, hidden), f"{source}.{names.router}.weight")
        self.correction = (
            parameter((count,), f"{source}.{config.correction}", dtype="float32")
            if config.correction
            else None
        )
        each = (Each("e", count, place=(1, 0, 0)),)

        def stacked(name: str, rows: int, columns: int, at: int = 0) -> Piece:
            one = f"{source}.experts.{{e}}.{name}.weight"
            return Piece(one, ((0, rows), (0, columns)), (0, at, 0), each=each)

        self.gate_up = parameter(
            (count, 2 * width, hidden),
            (stacked(names.gate, width, hidden), stacked(names.up, width, hidden, at=width)),
            shard=BY_EXPERTS,
            quantizable=True,
        )
        self.down = parameter(
            (count, hidden, width), (stacked(names.down, hidden, width),), shard=BY_EXPERTS, quantizable=True
        )
        self.router_bias = self.gate_up_bias = self.down_bias = None
        if config.bias:

            def biases(name: str, rows: int, at: int = 0) -> Piece:
                each = (Each("e", count, place=(1, 0)),)
                return Piece(f"{source}.experts.{{e}}.{name}.bias", ((0, rows),), (0, at), each=each)

            self.router_bias = parameter((count,), f"{source}.{names.router}.bias")
            self.gate_up_bias = parameter(
                (count, 2 * width),
                (biases(names.gate, width), biases(names.up, width, at=width)),
                shard=BY_EXPERTS[:-1],
            )
            self.down_bias = parameter((count, hidden), (biases(names.down, hidden),), shard=BY_EXPERTS[:-1])
        shared, features = f"{source}.{config.shared}", config.shared_intermediate
        self.shared = GatedMLP(shared, hidden, features, bias=False) if features else None
        gate = f"{source}.{config.shared_gate}.weight"
        self.shared_gate = parameter((1, hidden), gate) if config.shared_gate and features else None

    def forward(self, x_TC: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        k = self.config.routing.top_k
        logits_TE = gemm.linear(x_TC, self.router, self.router_bias, out_dtype="float32")
        weight_Tk, expert_Tk = routing.route(
            logits_TE, inputs.kv_slot, self.correction, **asdict(self.config.routing)
        )
        order, place_Tk, start = routing.sort_by_expert(expert_Tk, experts=self.config.experts)
        gate_up = products.grouped_linear(x_TC, self.gate_up, order, start, self.gate_up_bias, top_k=k)
        x = self.config.activation(gate_up)
        y = products.grouped_linear(x, self.down, order, start, self.down_bias, top_k=0)
        routed_TC = routing.combine(y, place_Tk, weight_Tk)
        if self.shared is None:
            return routed_TC
        shared_TC = self.shared(x_TC)
        if self.shared_gate is not None:
            gate_T1 = gemm.linear(x_TC, self.shared_gate, out_dtype="float32")
            shared_TC = elementwise.sigmoid_gate(shared_TC, gate_T1)
        return elementwise.add(routed_TC, shared_TC)
