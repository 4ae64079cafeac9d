"""Extend attention on the GPU: rows of any length, causal over their cached context (prefill, chunks, mixed).

A block takes one KV head and a *tile* of neighbouring tokens of one row: its M query vectors are those
tokens' N heads of the group, so keys and values are read once for the group. Which row and tokens a block
has follows from ``query_len`` on the device: all that there is to do is one line of *items*. Either as many
blocks as the device holds take one in every round, in turns from the left and from the right, so that they
get alike amounts; or there is a block for every item that the bucket could make, and what is too many ends at
once: 4 warps with a tile of 128 x 64 have no registers left for what outlives a round.

A tile whose keys exceed a block's fair share of all the work is cut into *parts* of the context, each an
item, which the last block to finish adds up: a few tokens after a long prefix, or one row that decodes
beside a chunk of another, keep all multiprocessors busy. Where rows must not depend on each other, no tile is
cut, and all keys run through the loop with masks: the other one takes as many as the tile's first token sees,
and rounds differently.

Keys that every token of the tile sees run through a loop without masks, fed by tensor maps where pages allow
it; the diagonal, and the edge of a sliding window, through a loop with masks.

# T tokens, R rows, M query vectors of a tile, N query heads a KV head, L keys of a step, D head size (padded
# to a power of two), B pages of a row
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention import extend_gluon
from makeready.kernels.attention.extend_items_triton import clear_idle, item_at, span, tokens_of
from makeready.kernels.attention.extend_steps_triton import attend_all, attend_some
from makeready.kernels.attention.extend_tiling import Way, ways
from makeready.kernels.attention.paged import extend_attention
from makeready.kernels.attention.pages_triton import as_queries
from makeready.kernels.attention.parts_triton import add_parts, is_last, leave_part
from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
)
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES


@triton.jit
def extend_attention_tiles(
    q,
    k_cache,
    v_cache,
    k_tiles,
    v_tiles,
    page_table,
    query_start,
    query_len,
    context_len,
    y,
    sums,
    stats,
    arrived,
    rows,
    tokens,
    table_stride,
    q_stride,
    y_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    EDGE: tl.constexpr,
    PAIR: tl.constexpr,
    TMA: tl.constexpr,
    SHARES: tl.constexpr,
    LEAST: tl.constexpr,
    ROUNDS: tl.constexpr,
    MASKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module. Any number of blocks works with ``ROUNDS``; without, a block has one item at most.

    Args:
        k_tiles, v_tiles: the caches as tensor maps with blocks ``[1, L, 1, D]`` where ``TMA``.
        sums: fp32 scratch ``[slots, M, HEAD_DIM]``, see :func:`~.extend_tiling.slots`.
        stats: fp32 scratch ``[slots, 2, M]``.
        arrived: int32 zeros ``[slots]``, zeros again at the end.
        scale: of scores, times log2(e); positive.
        R: ``rows`` or more, a power of two.
        D: ``HEAD_DIM`` or more, a power of two.
        EDGE: keys of a step where there are masks; a divisor of L.
        PAIR: two steps of keys share one update of the running maximum; needs ``PAGE % L == 0``.
        SHARES: blocks that the work is divided for.
        LEAST: keys of a part, at least; a multiple of both sides of a step.
        MASKED: all keys run through the loop with masks.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    clear_idle(
        y, query_start, query_len, rows, tokens, y_stride, tl.arange(0, R), tl.arange(0, M), tl.arange(0, D),
        KV_HEADS, GROUP, HEAD_DIM, M,
    )  # fmt: skip
    TOKENS: tl.constexpr = M // GROUP
    block, blocks = tl.program_id(0), tl.num_programs(0)
    turn = 0
    more, head, row, tile, part, share, slot = item_at(
        block, query_len, context_len, rows, tl.arange(0, R), KV_HEADS, WINDOW, TOKENS, L, SHARES, LEAST
    )  # fmt: skip
    while more:
        _attend(
            q, k_cache, v_cache, k_tiles, v_tiles, page_table + row.to(tl.int64) * table_stride,
            query_start + row, query_len + row, context_len + row, y, sums, stats, arrived,
            q_stride, y_stride, scale, head, tile, part, share, slot,
            KV_HEADS, GROUP, HEAD_DIM, PAGE, WINDOW, M, D, L, EDGE, PAIR, TMA, MASKED,
        )  # fmt: skip
        more = False
        if ROUNDS:
            turn += 1
            at = turn * blocks + tl.where(turn % 2 == 0, block, blocks - 1 - block)
            more, head, row, tile, part, share, slot = item_at(
                at, query_len, context_len, rows, tl.arange(0, R), KV_HEADS, WINDOW, TOKENS, L, SHARES, LEAST
            )  # fmt: skip


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    k_tiles,
    v_tiles,
    pages,
    query_start,
    query_len,
    context_len,
    y,
    sums,
    stats,
    arrived,
    q_stride,
    y_stride,
    scale,
    head,
    tile,
    part,
    share,
    slot,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    EDGE: tl.constexpr,
    PAIR: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One item: ``part`` of the keys of the row's ``tile``. Pointers to metadata and pages are the row's own."""
    TOKENS: tl.constexpr = M // GROUP
    count, length, start = tl.load(query_len), tl.load(context_len), tl.load(query_start)
    parts, low, open, shut, high = span(
        length - count + tile * TOKENS, length, part, share, TOKENS, WINDOW, L, PAIR
    )  # fmt: skip
    if part < parts:
        m = tl.arange(0, M)
        d = tl.arange(0, D)
        token_M, own_M = tokens_of(tile, count, m, M, GROUP)
        at_M = (start + token_M).to(tl.int64) * q_stride + (head * GROUP + m % GROUP) * HEAD_DIM
        own_MD = own_M[:, None] & (d < HEAD_DIM)[None, :]
        q_MD = as_queries(tl.load(q + at_M[:, None] + d[None, :], mask=own_MD, other=0.0), k_cache)
        max_M = tl.full((M,), float("-inf"), tl.float32)
        sum_M = tl.zeros((M,), tl.float32)
        acc_MD = tl.zeros((M, D), tl.float32)
        if WINDOW > 0 and not MASKED:
            max_M, sum_M, acc_MD = attend_some(
                q_MD, k_cache, v_cache, pages, head, length - count + token_M, scale, max_M, sum_M, acc_MD,
                low, tl.minimum(open, high), high, KV_HEADS, HEAD_DIM, PAGE, WINDOW, D, EDGE,
            )  # fmt: skip
        if not MASKED:
            max_M, sum_M, acc_MD = attend_all(
                q_MD, k_cache, v_cache, k_tiles, v_tiles, pages, head, scale, max_M, sum_M, acc_MD,
                open, shut, high, KV_HEADS, HEAD_DIM, PAGE, D, L, PAIR, TMA,
            )  # fmt: skip

        # Sizes and places again, loaded anew and with a zero added that the compiler cannot see through:
        # else it holds them in 50 registers of a thread through the loop.
        count, length = tl.load(query_len, volatile=True), tl.load(context_len, volatile=True)
        start = tl.load(query_start, volatile=True)
        m += tl.load(query_len, volatile=True) - count
        parts, low, open, shut, high = span(
            length - count + tile * TOKENS, length, part, share, TOKENS, WINDOW, L, PAIR
        )  # fmt: skip
        if MASKED:
            shut = low
        token_M, own_M = tokens_of(tile, count, m, M, GROUP)
        max_M, sum_M, acc_MD = attend_some(
            q_MD, k_cache, v_cache, pages, head, length - count + token_M, scale, max_M, sum_M, acc_MD,
            shut, high, high, KV_HEADS, HEAD_DIM, PAGE, WINDOW, D, EDGE,
        )  # fmt: skip
        m += tl.load(query_len, volatile=True) - count
        token_M, own_M = tokens_of(tile, count, m, M, GROUP)
        out_M = y + (start + token_M).to(tl.int64) * y_stride + (head * GROUP + m % GROUP) * HEAD_DIM
        if parts == 1:
            y_MD = acc_MD * (1.0 / sum_M)[:, None]
            kept = own_M[:, None] & (d < HEAD_DIM)[None, :]
            tl.store(out_M[:, None] + d[None, :], y_MD.to(y.dtype.element_ty), mask=kept)
        else:
            leave_part(sums, stats, slot + part * KV_HEADS, acc_MD, max_M, sum_M, m, d, M, HEAD_DIM)
            if is_last(arrived + slot, parts):
                # Some columns at a time, or registers would not do.
                c = tl.arange(0, 16)
                for column in range(0, HEAD_DIM, 16):
                    y_MC = add_parts(
                        sums, stats, slot, slot, KV_HEADS, parts, m, column + c, M, HEAD_DIM, 2
                    )  # fmt: skip
                    kept = own_M[:, None] & (column + c < HEAD_DIM)[None, :]
                    at_MC = out_M[:, None] + (column + c)[None, :]
                    tl.store(at_MC, y_MC.to(y.dtype.element_ty), mask=kept)


def _sixteen_bits(call: OpCall) -> bool:
    return DTYPE_BYTES[call.tensors["q"].dtype] == 2 and call.attrs["scale"] > 0


@cuda_kernel(extend_attention, "tiles", applies=_sixteen_bits, invariant=True)
def extend_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """Tiles of different sides, best first by the model of extend_tiling.py."""
    return [candidate(call, way) for way in ways(call)]


def candidate(call: OpCall, way: Way) -> Candidate:
    """The launch of ``way``, its parts in scratch behind one counter a slot."""
    if way.gluon:
        return extend_gluon.candidate(call, way)
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    page = int(call.tensors["k_cache"].shape[1])
    rows, tokens = int(call.tensors["page_table"].shape[0]), int(call.tensors["q"].shape[0])
    slots = way.slots(call)
    counters = triton.cdiv(4 * slots, 256) * 256
    stats = triton.cdiv(slots * 2 * way.m * 4, 256) * 256
    dependent = "pdl" in call.features

    def cache(name: str) -> Argument:
        strides = (page * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1)
        shape = ("P", page, kv_heads, head_dim)
        return Descriptor(name, shape, strides, (1, way.keys, 1, head_dim)) if way.tma else Pointer(name)

    launch = DeviceLaunch(
        function=f"{__name__}:extend_attention_tiles",
        constants={
            "KV_HEADS": kv_heads,
            "GROUP": heads // kv_heads,
            "HEAD_DIM": head_dim,
            "PAGE": page,
            "WINDOW": call.attrs["window"],
            "R": max(64, triton.next_power_of_2(call.most_rows if call.invariant else rows)),
            "M": way.m,
            "D": triton.next_power_of_2(max(head_dim, 16)),
            "L": way.keys,
            "EDGE": way.keys if way.masked else min(way.keys, 32),
            "PAIR": way.pair,
            "TMA": way.tma,
            "SHARES": way.shares(call),
            "LEAST": way.least,
            "ROUNDS": way.rounds,
            "MASKED": way.masked,
            "PDL": dependent,
        },
        arguments={
            **{name: Pointer(name) for name in ("q", "k_cache", "v_cache", "page_table", "y")},
            **{name: Pointer(name) for name in ("query_start", "query_len", "context_len")},
            "k_tiles": cache("k_cache"),
            "v_tiles": cache("v_cache"),
            "arrived": Scratch(0, "int32"),
            "stats": Scratch(counters, "float32"),
            "sums": Scratch(counters + stats, "float32"),
            "rows": Scalar(rows, "int32", specialize=False),
            "tokens": Scalar(tokens, "int32", specialize=False),
            "table_stride": Scalar(call.tensors["page_table"].row_stride, "int32", specialize=False),
            "q_stride": Scalar(call.tensors["q"].row_stride, "int32"),
            "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
            "scale": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(way.blocks(call), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
        local_bytes=96,  # 72 are used at 4 warps of 128 x 64, none of them inside a loop
    )
    scratch = counters + stats + slots * way.m * head_dim * 4
    return Candidate(way.name, (launch,), scratch, counters, 1e-6 * way.microseconds(call))
