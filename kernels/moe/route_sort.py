"""Choosing experts and sorting entries by them as one op: a launch less in every layer.

T tokens, E experts, k experts of a token
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import contract
from makeready.kernels.moe.route import route, sort_by_expert


@contract(
    "logits[T,E]:float32 kv_slot[T]:int32 bias?[E]:float32 -> "
    "order[T*top_k]:int32 place[T,top_k]:int32 start[experts+1]:int32 weight[T,top_k]:float32",
    flops="8*T*E",
    fuses=("route", "sort_by_expert"),
)
def route_and_sort(
    logits: torch.Tensor,
    kv_slot: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    experts: int,
    score: str = "softmax",
    renormalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_members: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`~.route.sort_by_expert` of the experts that :func:`~.route.route` gives, and its weights."""
    weight, expert = route(
        logits,
        kv_slot,
        bias,
        top_k=top_k,
        score=score,
        renormalise=renormalise,
        scale=scale,
        groups=groups,
        top_groups=top_groups,
        group_members=group_members,
    )
    return *sort_by_expert(expert, experts=experts), weight
