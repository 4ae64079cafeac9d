"""Choosing and sorting for deterministic plans on the CPU: a token is routed by itself."""

from __future__ import annotations

from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.moe.route import route, sort_by_expert
from makeready.kernels.moe.route_sort import route_and_sort
from makeready.kernels.registry import BY_ROWS, by_rows, kernel

assert isinstance(route, Contract)
assert isinstance(sort_by_expert, Contract)
assert isinstance(route_and_sort, Contract)

_ROUTE = by_rows(route, route.reference)


@kernel(route_and_sort, BY_ROWS, target="cpu", invariant=True, ordinary=False)
def route_and_sort_by_rows(
    logits: torch.Tensor, kv_slot: torch.Tensor, bias: torch.Tensor | None = None, **attrs: Any
) -> tuple[torch.Tensor, ...]:
    """``bias`` is of all tokens, attributes those of both ops."""
    experts = attrs.pop("experts")
    weight, expert = _ROUTE(logits, kv_slot, bias, **attrs)
    return *sort_by_expert.reference(expert, experts=experts), weight
