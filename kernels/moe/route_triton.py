"""Choosing experts and sorting entries by them, on GPUs.

# E experts, G groups of S experts each, k experts of a token, M entries
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.contract import Contract
from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.moe.route import route, sort_by_expert
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two

assert isinstance(route, Contract)
assert isinstance(sort_by_expert, Contract)

_MOST_EXPERTS = 1024  # a warp keeps a token's scores in registers: 32 a lane
_CHUNK = 4096  # entries that a block holds at once
_NOBODY = tl.constexpr(1 << 30)  # a number beyond all experts


@triton.jit
def scores_of(logits, bias, inside, SCORE: tl.constexpr):
    """Scores of a token's experts, and what they are ranked by: NaN and places of no expert last."""
    if SCORE == "softmax":
        above = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        score = above / tl.sum(tl.sum(above, 1), 0)
    else:
        score = tl.sigmoid(logits)
    rank = score if bias is None else score + bias
    return score, tl.where(inside & (rank == rank), rank, float("-inf"))


@triton.jit
def first_best(rank, number, among):
    """The lowest number of those ``among`` all that rank highest."""
    best = tl.max(tl.max(tl.where(among, rank, float("-inf")), 1), 0)
    return tl.min(tl.min(tl.where(among & (rank == best), number, _NOBODY), 1), 0)


@triton.jit
def eligible_groups(
    rank, number, inside, G: tl.constexpr, GP: tl.constexpr, TOP: tl.constexpr, BEST: tl.constexpr
):
    """``[GP, 1]``: whether a group is one of the ``TOP`` whose ``BEST`` best experts together rank highest."""
    worth = tl.zeros((GP, 1), tl.float32)
    left = inside
    for _ in tl.static_range(BEST):
        best = tl.max(tl.where(left, rank, float("-inf")), 1, keep_dims=True)
        first = tl.min(tl.where(left & (rank == best), number, _NOBODY), 1, keep_dims=True)
        left = left & (number != first)
        worth += best
    group = tl.arange(0, GP)[:, None]
    there = group < G
    chosen = group < 0
    for _ in tl.static_range(TOP):
        first = first_best(worth, group, there & (chosen == 0))
        chosen = chosen | (group == first)
    return chosen


@triton.jit
def best_experts(
    logits, kv_slot, bias, t,
    E: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr, SCORE: tl.constexpr, RENORMALISE: tl.constexpr, SCALE: tl.constexpr,
    G: tl.constexpr, TOP_GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """``[KP]`` weights and experts of token ``t``; those of no row have weight 0 and expert -1."""
    S: tl.constexpr = E // G
    group, member = tl.arange(0, GP)[:, None], tl.arange(0, SP)[None, :]
    inside = (group < G) & (member < S)
    number = group * S + member
    x = tl.load(logits + t.to(tl.int64) * LOGITS_STRIDE + number, mask=inside, other=float("-inf"))
    given = None
    if bias is not None:
        given = tl.load(bias + number, mask=inside, other=0.0)
    score, rank = scores_of(x, given, inside, SCORE)
    first_class = inside
    if G > 1:
        first_class = inside & eligible_groups(rank, number, inside, G, GP, TOP_GROUPS, MEMBERS)
        rank = tl.where(first_class, rank, float("-inf"))
    place = tl.arange(0, KP)
    weight = tl.zeros((KP,), tl.float32)
    expert = tl.full((KP,), -1, tl.int32)
    left = inside
    for i in tl.static_range(K):
        # Experts of other groups come behind all of the chosen ones, whatever their scores.
        among = left & first_class if i < TOP_GROUPS * S else left
        chosen = first_best(rank, number, among)
        left = left & (number != chosen)
        own = tl.sum(tl.sum(tl.where(number == chosen, score, 0.0), 1), 0)
        weight = tl.where(place == i, own, weight)
        expert = tl.where(place == i, chosen, expert)
    if RENORMALISE:
        weight = weight / tl.sum(weight, 0)
    nobody = tl.load(kv_slot + t) == 0
    return tl.where(nobody, 0.0, weight * SCALE), tl.where(nobody, -1, expert)


@triton.jit
def route_tokens(
    logits,
    kv_slot,
    bias,
    weight,
    expert,
    E: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The ``K`` best experts of one token a block, found one after the other.

    Args:
        bias: pointer or None.
        GP, SP, KP: G, E / G and K rounded up to powers of two.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    weight_K, expert_K = best_experts(
        logits, kv_slot, bias, t, E, GP, SP, K, KP, LOGITS_STRIDE, SCORE, RENORMALISE, SCALE, G, TOP_GROUPS, MEMBERS
    )  # fmt: skip
    i = tl.arange(0, KP)
    tl.store(weight + t * K + i, weight_K, mask=i < K)
    tl.store(expert + t * K + i, expert_K, mask=i < K)


@triton.jit
def sort_entries(
    expert,
    order,
    place,
    start,
    M,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Block e finds expert e's entries and their places; the one behind the last expert fills what is nobody's.

    Every block reads all entries, twice where they are more than a chunk: they come from L2, and no block waits for
    another.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    e = tl.program_id(0)
    j = tl.arange(0, CHUNK)
    before = 0
    for first in range(0, M, CHUNK):
        of = tl.load(expert + first + j, mask=first + j < M, other=-1)
        before += tl.sum(((of >= 0) & (of < e)).to(tl.int32), 0)
    tl.store(start + e, before)
    filled = before
    for first in range(0, M, CHUNK):
        at = first + j
        of = tl.load(expert + at, mask=at < M, other=E)
        if e < E:
            mine = of == e
            here = mine.to(tl.int32)
            to = filled + tl.cumsum(here, 0) - here
            tl.store(order + to, at, mask=mine)
            tl.store(place + at, to, mask=mine)
            filled += tl.sum(here, 0)
        else:
            tl.store(order + at, -1, mask=(at >= before) & (at < M))
            tl.store(place + at, -1, mask=of < 0)


def route_constants(call: OpCall) -> dict[str, Any]:
    """What :func:`best_experts` is compiled for."""
    attrs: Mapping[str, Any] = call.attrs
    experts, groups = call.dims["E"], attrs["groups"]
    return {
        "E": experts,
        "GP": power_of_two(groups),
        "SP": power_of_two(experts // groups),
        "K": attrs["top_k"],
        "KP": power_of_two(attrs["top_k"]),
        "LOGITS_STRIDE": call.tensors["logits"].row_stride,
        "SCORE": attrs["score"],
        "RENORMALISE": attrs["renormalise"],
        "SCALE": float(attrs["scale"]),
        "G": groups,
        "TOP_GROUPS": attrs["top_groups"],
        "MEMBERS": min(attrs["group_members"], experts // groups),
        **({} if "bias" in call.tensors else {"bias": None}),
    }


def routable(call: OpCall) -> bool:
    """Whether a warp has room for a token's scores and there are as many experts as are asked for."""
    experts, groups = call.dims["E"], call.attrs["groups"]
    padded = power_of_two(groups) * power_of_two(experts // groups)
    return experts % groups == 0 and padded <= _MOST_EXPERTS and call.attrs["top_k"] <= experts


@cuda_kernel(route, "a_token", applies=routable, invariant=True)
def route_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`route_tokens`."""
    pdl = "pdl" in call.features
    bias: dict[str, Argument] = {"bias": Pointer("bias")} if "bias" in call.tensors else {}
    launch = DeviceLaunch(
        function="makeready.kernels.moe.route_triton:route_tokens",
        constants=route_constants(call) | {"PDL": pdl},
        arguments=bias | {name: Pointer(name) for name in ("logits", "kv_slot", "weight", "expert")},
        grid=(call.dims["T"], 1, 1),
        num_warps=1,
        dependent=pdl,
    )
    return (Candidate("warp", (launch,)),)


@cuda_kernel(sort_by_expert, "an_expert", invariant=True)
def sort_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`sort_entries`."""
    experts, entries = call.attrs["experts"], call.dims["T"] * call.dims["k"]
    chunk = min(max(power_of_two(entries), 32), _CHUNK)
    pdl = "pdl" in call.features
    launch = DeviceLaunch(
        function="makeready.kernels.moe.route_triton:sort_entries",
        constants={"E": experts, "CHUNK": chunk, "PDL": pdl},
        arguments={
            **{name: Pointer(name) for name in ("expert", "order", "place", "start")},
            "M": Scalar(entries, "int32", specialize=False),
        },
        grid=(experts + 1, 1, 1),
        num_warps=max(1, min(8, chunk // 128)),
        dependent=pdl,
    )
    return (Candidate(f"chunk{chunk}", (launch,)),)
