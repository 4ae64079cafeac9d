"""Which experts a token goes to, and the order that puts tokens of one expert side by side.

T tokens, E experts, k experts of a token; an *entry* is one (token, expert) pair, T*k of them
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.numeric import widen

SCORES = ("softmax", "sigmoid")


@contract(
    "logits[T,E]:float32 kv_slot[T]:int32 bias?[E]:float32 -> weight[T,top_k]:float32 expert[T,top_k]:int32",
    rowwise="T",
    flops="8*T*E",
)
def route(
    logits: torch.Tensor,
    kv_slot: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    top_k: int,
    score: str = "softmax",
    renormalise: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_members: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``top_k`` experts of every token and their weights, best first.

    An expert's score is the softmax of the logits or their sigmoid. Experts are chosen by score plus ``bias``
    (DeepSeek-V3's correction, arXiv:2412.19437), their weights are scores alone, divided by their sum where
    ``renormalise``, times ``scale``. With ``groups`` > 1 only experts of the ``top_groups`` best of as many equal
    groups are eligible; a group is as good as its ``group_members`` best experts together (1 in DeepSeek-V2, 2 in
    V3). Of equals the one with the lower number comes first; NaN comes behind all numbers.

    Tokens of no row (``kv_slot`` 0) have expert -1 and weight 0 in all places.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, not {score!r}")
    wide = widen(logits)
    scores = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    chosen = scores if bias is None else scores + widen(bias)
    chosen = torch.where(chosen.isnan(), -torch.inf, chosen)
    if groups > 1:
        by_group = chosen.unflatten(-1, (groups, -1))
        rank = by_group.sort(stable=True, dim=-1, descending=True).values[..., :group_members].sum(-1)
        best = rank.sort(stable=True, dim=-1, descending=True).indices[:, :top_groups]
        eligible = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, best, True)
        eligible = eligible.repeat_interleave(chosen.shape[1] // groups, 1)
        # Beyond all numbers: an expert of no chosen group comes behind one whose score is NaN.
        order = torch.where(eligible, chosen, -torch.inf).sort(stable=True, dim=-1, descending=True).indices
        first = eligible.gather(1, order).int().sort(stable=True, dim=-1, descending=True).indices
        order = order.gather(1, first)
    else:
        order = chosen.sort(stable=True, dim=-1, descending=True).indices
    expert = order[:, :top_k]
    weight = scores.gather(1, expert)
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True)
    nobody = (kv_slot == 0).unsqueeze(1)
    weight = torch.where(nobody, 0, weight * scale).to(logits.dtype)
    return weight, torch.where(nobody, -1, expert).int()


@contract(
    "expert[T,k]:int32 -> order[T*k]:int32 place[T,k]:int32 start[experts+1]:int32",
    tolerance=Tolerance(exact=True),
)
def sort_by_expert(expert: torch.Tensor, *, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries by expert, those of an expert in the order of their tokens.

    ``order[j]`` is the j-th entry, as ``token * k + place among the token's``; expert e's are at ``start[e]`` to
    ``start[e + 1]``, and ``place`` is where each has come to. Entries of expert -1 are in nobody's part: their
    ``place`` is -1, and ``order`` is -1 from ``start[experts]`` on.
    """
    flat = expert.flatten().long()
    live = flat >= 0
    key = torch.where(live, flat, experts)
    by_key = key.sort(stable=True).indices
    count = int(live.sum())
    order = torch.full_like(by_key, -1)
    order[:count] = by_key[:count]
    place = torch.full_like(by_key, -1)
    place[by_key[:count]] = torch.arange(count)
    start = torch.zeros(experts + 1, dtype=torch.int32)
    start[1:] = torch.bincount(key, minlength=experts + 1)[:experts].cumsum(0)
    return order.int(), place.int().view_as(expert), start


@contract(
    "y[M,C]:A place[T,k]:int32 weight[T,k]:float32 -> sum[T,C]:A",
    rowwise="T",
    flops="2*T*k*C",
)
def combine(y: torch.Tensor, place: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every token's experts, weighted and added in the order in which the token has them.

    ``y[place[t, i]]`` is what expert i of token t gave. Entries without a place count nothing.
    """
    live = place >= 0
    parts = widen(y)[place.clamp_min(0).long()] * widen(weight).unsqueeze(-1)
    return torch.where(live.unsqueeze(-1), parts, 0).sum(1).to(y.dtype)
