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
from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.moe.route import route, sort_by_expert
from makeready.kernels.moe.route_sort import route_and_sort
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two

assert isinstance(route, Contract)
assert isinstance(sort_by_expert, Contract)
assert isinstance(route_and_sort, Contract)

_MOST_EXPERTS = 1024  # a warp keeps a token's scores in registers: 32 a lane
_CHUNK = 4096  # entries that a block of the sort holds at once
_TOGETHER = 256  # entries that one block routes and compares with each other
_NOBODY = tl.constexpr(1 << 30)  # a number beyond all experts


@triton.jit
def all_of(x, OP: tl.constexpr):
    """``[R, 1, 1]``: the largest, the smallest or the sum over a token's experts."""
    if OP == "max":
        return tl.max(tl.max(x, 2, keep_dims=True), 1, keep_dims=True)
    if OP == "min":
        return tl.min(tl.min(x, 2, keep_dims=True), 1, keep_dims=True)
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def first_best(rank, number, among):
    """``[R, 1, 1]``: the lowest number of those ``among`` all that rank highest."""
    best = all_of(tl.where(among, rank, float("-inf")), "max")
    return all_of(tl.where(among & (rank == best), number, _NOBODY), "min")


@triton.jit
def eligible_groups(
    rank, number, inside, G: tl.constexpr, GP: tl.constexpr, TOP: tl.constexpr, BEST: tl.constexpr
):
    """``[R, GP, 1]``: whether a group is one of the ``TOP`` whose ``BEST`` best experts together rank highest."""
    worth = 0.0
    left = inside
    for _ in tl.static_range(BEST):
        best = tl.max(tl.where(left, rank, float("-inf")), 2, keep_dims=True)
        first = tl.min(tl.where(left & (rank == best), number, _NOBODY), 2, keep_dims=True)
        left = left & (number != first)
        worth += best
    group = tl.arange(0, GP)[None, :, None]
    left = (worth == worth) & (group < G)
    for _ in tl.static_range(TOP):
        left = left & (group != first_best(worth, group, left))
    return (left == 0) & (group < G)


@triton.jit
def best_experts(
    logits, kv_slot, bias, t, T,
    E: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr, SCORE: tl.constexpr, RENORMALISE: tl.constexpr, SCALE: tl.constexpr,
    G: tl.constexpr, TOP_GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """``[R, KP]`` weights and experts of tokens ``t[R]``; those of no row have weight 0 and expert -1."""
    S: tl.constexpr = E // G
    group, member = tl.arange(0, GP)[None, :, None], tl.arange(0, SP)[None, None, :]
    token = t[:, None, None]
    inside = (group < G) & (member < S) & (token < T)
    number = group * S + member
    x = tl.load(logits + token.to(tl.int64) * LOGITS_STRIDE + number, mask=inside, other=float("-inf"))
    if SCORE == "softmax":
        above = tl.exp(x - all_of(x, "max"))
        score = above / all_of(above, "sum")
    else:
        score = tl.sigmoid(x)
    rank = score
    if bias is not None:
        rank += tl.load(bias + number, mask=inside, other=0.0)
    rank = tl.where(inside & (rank == rank), rank, float("-inf"))
    first_class = inside
    if G > 1:
        first_class = inside & eligible_groups(rank, number, inside, G, GP, TOP_GROUPS, MEMBERS)
        rank = tl.where(first_class, rank, float("-inf"))
    i = tl.arange(0, KP)[None, :]
    weight = tl.zeros((R, KP), tl.float32)
    expert = tl.full((R, KP), -1, tl.int32)
    left = inside
    for k in tl.static_range(K):
        # Experts of other groups come behind all of the chosen ones, whatever their scores.
        among = left & first_class if k < TOP_GROUPS * S else left
        chosen = first_best(rank, number, among)
        left = left & (number != chosen)
        own = all_of(tl.where(number == chosen, score, 0.0), "sum")
        weight = tl.where(i == k, tl.reshape(own, (R, 1)), weight)
        expert = tl.where(i == k, tl.reshape(chosen, (R, 1)), expert)
    if RENORMALISE:
        weight = weight / tl.sum(weight, 1, keep_dims=True)
    nobody = tl.load(kv_slot + t, mask=t < T, other=0)[:, None] == 0
    return tl.where(nobody, 0.0, weight * SCALE), tl.where(nobody, -1, expert)


@triton.jit
def route_tokens(
    logits,
    kv_slot,
    bias,
    weight,
    expert,
    T,
    E: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The ``K`` best experts of ``R`` tokens a block, found one after the other.

    Args:
        bias: pointer or None.
        GP, SP, KP: G, E / G and K rounded up to powers of two.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * R + tl.arange(0, R)
    weight_RK, expert_RK = best_experts(
        logits, kv_slot, bias, t, T,
        E, GP, SP, K, KP, R, LOGITS_STRIDE, SCORE, RENORMALISE, SCALE, G, TOP_GROUPS, MEMBERS,
    )  # fmt: skip
    i = tl.arange(0, KP)[None, :]
    there = (t < T)[:, None] & (i < K)
    tl.store(weight + t[:, None] * K + i, weight_RK, mask=there)
    tl.store(expert + t[:, None] * K + i, expert_RK, mask=there)


@triton.jit
def route_and_sort_tokens(
    logits,
    kv_slot,
    bias,
    weight,
    order,
    place,
    start,
    T,
    E: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    EP: tl.constexpr,
    PDL: tl.constexpr,
):
    """All of at most ``R`` tokens in one block. An entry's place is how many come before it: few are compared with
    each other.

    Args:
        EP: E + 1 rounded up to a power of two.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.arange(0, R)
    weight_RK, expert_RK = best_experts(
        logits, kv_slot, bias, t, T,
        E, GP, SP, K, KP, R, LOGITS_STRIDE, SCORE, RENORMALISE, SCALE, G, TOP_GROUPS, MEMBERS,
    )  # fmt: skip
    i = tl.arange(0, KP)[None, :]
    tl.store(weight + t[:, None] * K + i, weight_RK, mask=(t < T)[:, None] & (i < K))

    M: tl.constexpr = R * KP
    # Entries in the order of their tokens; those of nobody, and places of no entry, come behind all experts.
    of = tl.reshape(tl.where(expert_RK < 0, E, expert_RK), (M,))
    m = tl.arange(0, M)
    entry = m // KP * K + m % KP
    there = (m // KP < T) & (m % KP < K)
    own, others = of[:, None], of[None, :]
    earlier = (others < own) | ((others == own) & (m[None, :] < m[:, None]))
    to = tl.sum(earlier.to(tl.int32), 1)
    live = of < E
    tl.store(place + entry, tl.where(live, to, -1), mask=there)
    tl.store(order + to, entry, mask=live)
    count = tl.sum(live.to(tl.int32), 0)
    tl.store(order + m, -1, mask=(m >= count) & (m < T * K))
    e = tl.arange(0, EP)
    tl.store(start + e, tl.sum((others < e[:, None]).to(tl.int32), 1), mask=e <= E)


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


def _constants(call: OpCall) -> dict[str, Any]:
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
    return (Candidate("warp", (_route(call, Pointer("expert")),)),)


@cuda_kernel(sort_by_expert, "an_expert", invariant=True)
def sort_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`sort_entries`."""
    return (Candidate("blocks", (_sort(call, Pointer("expert"), call.dims["T"] * call.dims["k"]),)),)


@cuda_kernel(route_and_sort, "tokens", applies=routable, invariant=True)
def route_and_sort_launches(call: OpCall) -> Sequence[Candidate]:
    """One block for few tokens, see :func:`route_and_sort_tokens`; the two launches of its parts for any number."""
    entries = call.dims["T"] * call.attrs["top_k"]
    expert = Scratch(0, "int32")
    both = Candidate(
        "two", (_route(call, expert), _sort(call, expert, entries)), scratch=-(-4 * entries // 256) * 256
    )
    rows = power_of_two(call.dims["T"])
    if call.invariant or rows * power_of_two(call.attrs["top_k"]) > _TOGETHER:
        return (both,)
    one = _launch(
        call,
        "route_and_sort_tokens",
        _constants(call) | {"R": rows, "EP": power_of_two(call.dims["E"] + 1)},
        {name: Pointer(name) for name in ("logits", "kv_slot", "weight", "order", "place", "start")},
        blocks=1,
        num_warps=4 if rows <= 4 else 8,
    )
    return (Candidate("one", (one,)), both)


def _route(call: OpCall, expert: Argument) -> DeviceLaunch:
    return _launch(
        call,
        "route_tokens",
        _constants(call) | {"R": 1},
        {name: Pointer(name) for name in ("logits", "kv_slot", "weight")} | {"expert": expert},
        blocks=call.dims["T"],
        num_warps=1,
    )


def _launch(
    call: OpCall,
    function: str,
    constants: dict[str, Any],
    arguments: dict[str, Argument],
    *,
    blocks: int,
    num_warps: int,
) -> DeviceLaunch:
    bias: dict[str, Argument] = {"bias": Pointer("bias")} if "bias" in call.tensors else {}
    return DeviceLaunch(
        function=f"makeready.kernels.moe.route_triton:{function}",
        constants=constants | {"PDL": "pdl" in call.features},
        arguments={**arguments, **bias, "T": Scalar(call.dims["T"], "int32", specialize=False)},
        grid=(blocks, 1, 1),
        num_warps=num_warps,
        dependent="pdl" in call.features,
    )


def _sort(call: OpCall, expert: Argument, entries: int) -> DeviceLaunch:
    experts, pdl = call.attrs["experts"], "pdl" in call.features
    # The same in all buckets of a deterministic plan; places do not depend on it.
    chunk = _CHUNK if call.invariant else min(max(power_of_two(entries), 32), _CHUNK)
    return DeviceLaunch(
        function="makeready.kernels.moe.route_triton:sort_entries",
        constants={"E": experts, "CHUNK": chunk, "PDL": pdl},
        arguments={
            "expert": expert,
            **{name: Pointer(name) for name in ("order", "place", "start")},
            "M": Scalar(entries, "int32", specialize=False),
        },
        grid=(experts + 1, 1, 1),
        num_warps=max(1, min(8, chunk // 128)),
        dependent=pdl,
    )
