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

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.extend_steps_triton import attend_all, attend_some
from makeready.kernels.attention.pages_triton import as_queries
from makeready.kernels.attention.parts_triton import add_parts, is_last, leave_part, with_sinks
from makeready.kernels.attention.scales_triton import unscaled


@triton.jit
def extend_attention_tiles(
    q,
    k_cache,
    v_cache,
    k_tiles,
    v_tiles,
    scales,
    page_table,
    query_start,
    query_len,
    context_len,
    sinks,
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
    BITS: tl.constexpr,
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
        scales: fp16, see :mod:`~.scaled`, and BITS of a number; None and 0 where numbers have none.
        sinks: fp32 logits of heads that join denominators, or None.
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
    _clear_idle(
        y, query_start, query_len, rows, tokens, y_stride, KV_HEADS, GROUP, HEAD_DIM, R, M, D
    )  # fmt: skip
    TOKENS: tl.constexpr = M // GROUP
    block, blocks = tl.program_id(0), tl.num_programs(0)
    turn = 0
    more, head, row, tile, part, share, slot = _item(
        block, query_len, context_len, rows, KV_HEADS, WINDOW, R, TOKENS, L, SHARES, LEAST
    )  # fmt: skip
    while more:
        _attend(
            q, k_cache, v_cache, k_tiles, v_tiles, scales, page_table + row.to(tl.int64) * table_stride,
            query_start + row, query_len + row, context_len + row, sinks, y, sums, stats, arrived,
            q_stride, y_stride, scale, head, tile, part, share, slot,
            KV_HEADS, GROUP, HEAD_DIM, BITS, PAGE, WINDOW, M, D, L, EDGE, PAIR, TMA, MASKED,
        )  # fmt: skip
        more = False
        if ROUNDS:
            turn += 1
            at = turn * blocks + tl.where(turn % 2 == 0, block, blocks - 1 - block)
            more, head, row, tile, part, share, slot = _item(
                at, query_len, context_len, rows, KV_HEADS, WINDOW, R, TOKENS, L, SHARES, LEAST
            )  # fmt: skip


@triton.jit
def _clear_idle(
    y, query_start, query_len, rows, tokens, y_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, R: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Zeros for tokens of no row."""
    TOKENS: tl.constexpr = M // GROUP
    row_R = tl.arange(0, R)
    count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    if tl.sum(count_R, 0) < tokens:
        start_R = tl.load(query_start + row_R, mask=row_R < rows, other=0)
        m = tl.arange(0, M)
        d = tl.arange(0, D)
        tile = tl.program_id(0)
        while tile < tl.cdiv(tokens, TOKENS) * KV_HEADS:
            token_M = tile // KV_HEADS * TOKENS + m // GROUP
            after_MR = start_R[None, :] <= token_M[:, None]
            of_row_MR = after_MR & (token_M[:, None] < (start_R + count_R)[None, :])
            idle_M = (tl.sum(of_row_MR.to(tl.int32), 1) == 0) & (token_M < tokens) & (m < TOKENS * GROUP)
            head_MD = (tile % KV_HEADS * GROUP + m % GROUP)[:, None] * HEAD_DIM + d[None, :]
            at_MD = token_M.to(tl.int64)[:, None] * y_stride + head_MD
            zero_MD = tl.zeros((M, D), y.dtype.element_ty)
            tl.store(y + at_MD, zero_MD, mask=idle_M[:, None] & (d < HEAD_DIM)[None, :])
            tile += tl.num_programs(0)


@triton.jit
def _item(
    at, query_len, context_len, rows, KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, R: tl.constexpr,
    TOKENS: tl.constexpr, L: tl.constexpr, SHARES: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Whether there is an item at place ``at``, and its head, row, tile and part of the row, most keys
    of a part, and the slot of the tile's part 0 (part i has ``i * KV_HEADS`` more).
    """
    row_R = tl.arange(0, R)
    count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    longest_R = tl.load(context_len + row_R, mask=row_R < rows, other=0)
    average_R = longest_R - count_R // 2
    if WINDOW > 0:
        longest_R = tl.minimum(longest_R, WINDOW + TOKENS + L)
        average_R = tl.minimum(average_R, WINDOW + TOKENS + L)
    tiles_R = tl.cdiv(count_R, TOKENS)
    steps = tl.sum(tiles_R * tl.cdiv(average_R, L), 0) * KV_HEADS
    share = tl.maximum(tl.cdiv(steps, SHARES) * L, LEAST)
    parts_R = tl.cdiv(longest_R, share)
    items_R = tiles_R * parts_R
    end_R = tl.cumsum(items_R, 0)
    total = tl.max(end_R, 0) * KV_HEADS
    # The last tiles of a row see most keys: they come first, and the short ones fill the gaps at the end.
    place = tl.maximum(total - 1 - at, 0)
    head = place % KV_HEADS
    place = place // KV_HEADS
    row = tl.minimum(tl.sum((end_R <= place).to(tl.int32), 0), rows - 1)
    place -= tl.sum(tl.where(row_R < row, items_R, 0), 0)
    parts = tl.maximum(tl.sum(tl.where(row_R == row, parts_R, 0), 0), 1)
    tile = place // parts
    before = tl.sum(tl.where((row_R < row) & (parts_R > 1), items_R, 0), 0)
    slot = (before + tile * parts) * KV_HEADS + head
    return at < total, head, row, tile, place % parts, share, slot


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    k_tiles,
    v_tiles,
    scales,
    pages,
    query_start,
    query_len,
    context_len,
    sinks,
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
    BITS: tl.constexpr,
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
    parts, low, open, shut, high = _span(
        length - count + tile * TOKENS, length, part, share, TOKENS, WINDOW, L, PAIR
    )  # fmt: skip
    if part < parts:
        m = tl.arange(0, M)
        d = tl.arange(0, D)
        token_M, own_M = _tokens(tile, count, m, M, GROUP)
        at_M = (start + token_M).to(tl.int64) * q_stride + (head * GROUP + m % GROUP) * HEAD_DIM
        own_MD = own_M[:, None] & (d < HEAD_DIM)[None, :]
        q_MD = as_queries(tl.load(q + at_M[:, None] + d[None, :], mask=own_MD, other=0.0), k_cache)
        max_M = tl.full((M,), float("-inf"), tl.float32)
        sum_M = tl.zeros((M,), tl.float32)
        acc_MD = tl.zeros((M, D), tl.float32)
        offset_M = tl.zeros((M,), tl.float32)  # weighted offsets of numbers that have them
        if WINDOW > 0 and not MASKED:
            max_M, sum_M, acc_MD, offset_M = attend_some(
                q_MD, k_cache, v_cache, scales, pages, head, length - count + token_M, scale,
                max_M, sum_M, acc_MD, offset_M,
                low, tl.minimum(open, high), high, KV_HEADS, HEAD_DIM, BITS, PAGE, WINDOW, D, EDGE,
            )  # fmt: skip
        if not MASKED:
            max_M, sum_M, acc_MD, offset_M = attend_all(
                q_MD, k_cache, v_cache, k_tiles, v_tiles, scales, pages, head, scale,
                max_M, sum_M, acc_MD, offset_M,
                open, shut, high, KV_HEADS, HEAD_DIM, BITS, PAGE, D, L, PAIR, TMA,
            )  # fmt: skip

        # Sizes and places again, loaded anew and with a zero added that the compiler cannot see through:
        # else it holds them in 50 registers of a thread through the loop.
        count, length = tl.load(query_len, volatile=True), tl.load(context_len, volatile=True)
        start = tl.load(query_start, volatile=True)
        m += tl.load(query_len, volatile=True) - count
        parts, low, open, shut, high = _span(
            length - count + tile * TOKENS, length, part, share, TOKENS, WINDOW, L, PAIR
        )  # fmt: skip
        if MASKED:
            shut = low
        token_M, own_M = _tokens(tile, count, m, M, GROUP)
        max_M, sum_M, acc_MD, offset_M = attend_some(
            q_MD, k_cache, v_cache, scales, pages, head, length - count + token_M, scale,
            max_M, sum_M, acc_MD, offset_M,
            shut, high, high, KV_HEADS, HEAD_DIM, BITS, PAGE, WINDOW, D, EDGE,
        )  # fmt: skip
        if BITS > 0:
            acc_MD = unscaled(acc_MD, BITS)
        if BITS == 4:
            acc_MD += offset_M[:, None]
        m += tl.load(query_len, volatile=True) - count
        token_M, own_M = _tokens(tile, count, m, M, GROUP)
        out_M = y + (start + token_M).to(tl.int64) * y_stride + (head * GROUP + m % GROUP) * HEAD_DIM
        if parts == 1:
            sum_M = with_sinks(sum_M, max_M, sinks, head * GROUP + m % GROUP, own_M)
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
                        sums, stats, slot, slot, KV_HEADS, parts, m, column + c, sinks, head * GROUP + m % GROUP,
                        M, HEAD_DIM, 2,
                    )  # fmt: skip
                    kept = own_M[:, None] & (column + c < HEAD_DIM)[None, :]
                    at_MC = out_M[:, None] + (column + c)[None, :]
                    tl.store(at_MC, y_MC.to(y.dtype.element_ty), mask=kept)


@triton.jit
def _tokens(tile, count, m, M: tl.constexpr, GROUP: tl.constexpr):
    """Tokens of the row that the query vectors ``m`` of a tile belong to, and which of them exist."""
    token_M = tile * (M // GROUP) + m // GROUP
    return token_M, (token_M < count) & (m < M // GROUP * GROUP)


@triton.jit
def _span(
    position, length, part, share, TOKENS: tl.constexpr, WINDOW: tl.constexpr, L: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """Parts of the tile whose first token is at ``position``, and of its part the keys ``low : high`` that some
    token of the tile sees, among them ``open : shut`` that all of them see.
    """
    STEP: tl.constexpr = L * (1 + PAIR)
    low = 0
    open = 0
    high = tl.minimum(position + TOKENS, length)
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0) // L * L
        open = tl.maximum(high - WINDOW + L - 1, 0) // L * L
    size = tl.cdiv(tl.cdiv(high - low, tl.cdiv(high - low, share)), STEP) * STEP
    parts = tl.cdiv(high - low, size)
    low += part * size
    high = tl.minimum(low + size, high)
    open = tl.minimum(tl.maximum(open, low), tl.cdiv(high, L) * L)
    shut = tl.minimum(position + 1, high)
    shut = open + tl.maximum(shut - open, 0) // STEP * STEP
    return parts, low, open, shut, high
