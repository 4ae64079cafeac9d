"""Absorbed latent attention on the GPU: one query a row, or rows of any length over what is cached of them.

A block takes N query vectors (heads of neighbouring tokens of a row; latents are the same for all heads) and walks
over their keys in tiles of K latents, which it loads once: scores are products of a tile with queries, outputs of the
tile's transpose with weights. Latents are the long side of both products, so that few vectors waste nothing.

All that there is to do is one line of *items* (a row's query tiles). Where items are ``SPLIT``, the line is made of
their key tiles, and every block takes an equal share of it: a block whose share covers an item writes its result,
and where a boundary cuts one, each block leaves its part in scratch. :func:`add_latent_parts` adds them in the order
of their keys: a part has up to 128 KiB, too much for one block to read those of a long row. Without ``SPLIT`` a
block takes whole items, and what it computes of a query vector does not depend on the other ones.

# T tokens, R rows, N query vectors of a tile, K keys of a tile, D rank and Q rotated features (powers of two)
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.mla_items_triton import first_token, item_at, line, row_of, share_of
from makeready.kernels.attention.pages_triton import as_queries, pages_of, slots_of
from makeready.kernels.attention.parts_triton import gather_parts, leave_part
from makeready.kernels.prefetch_triton import prefetch

_HIDDEN = tl.constexpr(
    -1e30
)  # score of a key that a query does not see: finite, as in extend_steps_triton.py
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def latent_attention_tiles(
    q,
    cache,
    rope_cache,
    scales,
    page_table,
    query_start,
    query_len,
    context_len,
    y,
    log_sum,
    sums,
    stats,
    rows,
    tokens,
    table_stride,
    q_stride,
    y_stride,
    log_stride,
    scale,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    OWN: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module. Any number of blocks works.

    Args:
        rope_cache, scales: of a cache with scales (mla_scaled.py), else None.
        query_start, query_len: None where every row with context has one query.
        log_sum: fp32, or None.
        sums: fp32 scratch ``[2 * blocks, N, RANK]`` where ``SPLIT``, else None.
        stats: fp32 scratch ``[2 * blocks, 2, N]``: maxima of the scaled scores, denominators.
        scale: of scores, times log2(e).
        OWN: keys are those up to the query itself, not only those before the step.
        R: ``rows`` or more, a power of two.
        LEAST: key tiles of a share, at least.
        AHEAD: bring a block's first tile to L2 while the kernels before still run.
    """
    if PDL:
        gdc_launch_dependents()
    # Lengths and pages are there before the kernel starts: they are among what it reads early.
    row_R = tl.arange(0, R)
    end_R, work_R, total = line(query_len, context_len, row_R, rows, HEADS, OWN, N, K, SPLIT)
    block, blocks = tl.program_id(0), tl.num_programs(0)
    at = block
    stop = total
    if SPLIT:
        share = share_of(total, blocks, LEAST)
        at = block * share
        stop = tl.minimum(at + share, total)
    mine = at
    row, item, begin, tiles = item_at(
        at, end_R, work_R, row_R, query_len, context_len, rows, OWN, K, SPLIT
    )  # fmt: skip
    if PDL:
        if AHEAD and at < stop:
            first = at - begin if SPLIT else 0
            _, _, keys = row_of(row, query_len, context_len, OWN)
            pages = page_table + row.to(tl.int64) * table_stride
            token_K = tl.minimum(first * K + tl.arange(0, K), keys - 1)
            slot_K = tl.load(pages + token_K // PAGE).to(tl.int64) * PAGE + token_K % PAGE
            WIDTH: tl.constexpr = RANK + ROPE if scales is None else RANK
            prefetch(cache + slot_K * WIDTH, WIDTH * cache.dtype.element_ty.primitive_bitwidth // 8)
        gdc_wait()

    n = tl.arange(0, N)
    d = tl.arange(0, D)
    j = tl.arange(0, Q)
    while at < stop:
        count, before, keys = row_of(row, query_len, context_len, OWN)
        start = first_token(row, query_start)
        vector_N = item * N + n
        own_N = vector_N < count * HEADS
        high = keys
        if OWN:
            high = tl.minimum(before + (item * N + N - 1) // HEADS + 1, keys)
        upto = at + 1
        first = 0
        last = tl.cdiv(high, K)
        if SPLIT:
            upto = tl.minimum(begin + tiles, stop)
            first = at - begin
            last = tl.minimum(upto - begin, last)

        at_N = (start + vector_N // HEADS).to(tl.int64) * q_stride + vector_N % HEADS * (RANK + ROPE)
        q_ND = tl.load(q + at_N[:, None] + d[None, :], mask=own_N[:, None] & (d < RANK)[None, :], other=0.0)
        q_NQ = tl.load(
            q + at_N[:, None] + RANK + j[None, :], mask=own_N[:, None] & (j < ROPE)[None, :], other=0.0
        )  # fmt: skip
        max_N, sum_N, acc_DN = _attend(
            as_queries(q_ND, cache), as_queries(q_NQ, cache) if scales is None else q_NQ, cache, rope_cache, scales,
            page_table + row.to(tl.int64) * table_stride,
            before + vector_N // HEADS, scale, first, last, high, RANK, ROPE, PAGE,
            OWN and query_len is not None, N, D, Q, K,
        )  # fmt: skip

        if upto - at == tiles:
            token_N = (start + vector_N // HEADS).to(tl.int64)
            out_N = y + token_N * y_stride + vector_N % HEADS * RANK
            y_DN = (acc_DN / sum_N[None, :]).to(y.dtype.element_ty)
            tl.store(out_N[:, None] + d[None, :], y_DN.T, mask=own_N[:, None] & (d < RANK)[None, :])
            if log_sum is not None:
                to_N = log_sum + token_N * log_stride + vector_N % HEADS
                tl.store(to_N, (max_N + tl.log2(sum_N)) * _LN2, mask=own_N)
        elif SPLIT:
            # The first part of a share has slot 0, a later one (only the last can be a part) slot 1.
            slot = 2 * block + (at > mine).to(tl.int32)
            leave_part(sums, stats, slot, acc_DN.T, max_N, sum_N, n, d, N, RANK)
        at = upto if SPLIT else at + blocks
        row, item, begin, tiles = item_at(
            at, end_R, work_R, row_R, query_len, context_len, rows, OWN, K, SPLIT
        )  # fmt: skip

    _clear_idle(
        y, log_sum, query_start, query_len, context_len, rows, tokens, y_stride, log_stride, HEADS, RANK, OWN, R
    )  # fmt: skip


@triton.jit
def add_latent_parts(
    query_start,
    query_len,
    context_len,
    y,
    log_sum,
    sums,
    stats,
    rows,
    blocks,
    y_stride,
    log_stride,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    OWN: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    LEAST: tl.constexpr,
    V: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the parts of the items that boundaries of shares cut: ``blocks`` times ``N / V`` blocks of V vectors.

    An item is added by the blocks of the share that it begins in.
    """
    if PDL:
        gdc_launch_dependents()
    row_R = tl.arange(0, R)
    end_R, work_R, total = line(query_len, context_len, row_R, rows, HEADS, OWN, N, K, True)
    share = share_of(total, blocks, LEAST)
    block = tl.program_id(0) // (N // V)
    cut = (block + 1) * share
    row, item, begin, tiles = item_at(
        cut, end_R, work_R, row_R, query_len, context_len, rows, OWN, K, True
    )  # fmt: skip
    if PDL:
        gdc_wait()
    if (cut < total) & (begin < cut) & (begin >= cut - share):
        n = tl.program_id(0) % (N // V) * V + tl.arange(0, V)
        d = tl.arange(0, D)
        count, _, _ = row_of(row, query_len, context_len, OWN)
        vector_V = item * N + n
        own_V = vector_V < count * HEADS
        # Of the oldest share it is the last part, of all others the first.
        part = 2 * block + (begin > cut - share).to(tl.int32)
        parts = (begin + tiles - 1) // share - block + 1
        max_V, sum_V, acc_VD = gather_parts(
            sums, stats, part, 2 * block, 2, parts, n, d, N, RANK, AT_ONCE
        )  # fmt: skip
        token_V = (first_token(row, query_start) + vector_V // HEADS).to(tl.int64)
        out_V = y + token_V * y_stride + vector_V % HEADS * RANK
        y_VD = (acc_VD / sum_V[:, None]).to(y.dtype.element_ty)
        tl.store(out_V[:, None] + d[None, :], y_VD, mask=own_V[:, None] & (d < RANK)[None, :])
        if log_sum is not None:
            to_V = log_sum + token_V * log_stride + vector_V % HEADS
            tl.store(to_V, (max_V + tl.log2(sum_V)) * _LN2, mask=own_V)


@triton.jit
def _attend(
    q_ND,
    q_NQ,
    cache,
    rope_cache,
    scales,
    pages,
    position_N,
    scale,
    first,
    last,
    high,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    """Maxima, denominators and unscaled sums of query vectors over key tiles ``first : last`` before key ``high``,
    of which they see those up to their position where ``CAUSAL``.

    Of a cache with scales, products are taken of its numbers: a token's scale multiplies scores and weights, the
    latter 64 times, as by itself it would leave them among fp16's subnormal numbers.
    """
    k = tl.arange(0, K)
    d = tl.arange(0, D)
    j = tl.arange(0, Q)
    max_N = tl.full((N,), float("-inf"), tl.float32)
    # A thread adds up its own keys; the sum over all of them waits until the end.
    sum_KN = tl.zeros((K, N), tl.float32)
    acc_DN = tl.zeros((D, N), tl.float32)
    # Page numbers are read one tile ahead, or each tile would wait for two memory latencies in a row.
    page = pages_of(pages, first * K, high, PAGE, K)
    for i in range(first, last):
        key = i * K
        at_K = slots_of(page, key, PAGE, K)
        # Slots that hold no token may hold NaN: they are not read.
        there = (key + k < high)[:, None]
        is_c, is_r = there, there
        if D != RANK:
            is_c &= (d < RANK)[None, :]
        if Q != ROPE:
            is_r &= (j < ROPE)[None, :]
        if scales is None:
            at_K *= RANK + ROPE
            of_r_K = at_K + RANK
            turned = cache
        else:
            scale_K = tl.load(scales + at_K, mask=key + k < high, other=0.0)
            of_r_K = at_K * ROPE
            at_K *= RANK
            turned = rope_cache
        c_KD = tl.load(cache + at_K[:, None] + d[None, :], mask=is_c, other=0.0).to(q_ND.dtype)
        r_KQ = tl.load(turned + of_r_K[:, None] + j[None, :], mask=is_r, other=0.0).to(q_NQ.dtype)
        page = pages_of(pages, key + K, high, PAGE, K)
        score_KN = tl.dot(c_KD, q_ND.T)
        if scales is not None:
            score_KN *= scale_K[:, None]
        score_KN = tl.dot(r_KQ, q_NQ.T, score_KN)
        seen = there
        if CAUSAL:
            seen &= (key + k)[:, None] <= position_N[None, :]
        score_KN = tl.where(seen, score_KN * scale, _HIDDEN)
        higher_N = tl.maximum(max_N, tl.max(score_KN, 0))
        p_KN = tl.exp2(score_KN - higher_N[None, :])
        shrink_N = tl.exp2(max_N - higher_N)
        sum_KN = sum_KN * shrink_N[None, :] + p_KN
        if scales is not None:
            p_KN *= (scale_K * 64)[:, None]
        acc_DN = tl.dot(c_KD.T, p_KN.to(q_ND.dtype), acc_DN * shrink_N[None, :])
        max_N = higher_N
    if scales is not None:
        acc_DN *= 1 / 64
    return max_N, tl.sum(sum_KN, 0), acc_DN


@triton.jit
def _clear_idle(
    y, log_sum, query_start, query_len, context_len, rows, tokens, y_stride, log_stride, HEADS: tl.constexpr,
    RANK: tl.constexpr, OWN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Zeros, and logarithms of -inf, for tokens of no row and of rows that have no keys."""
    row_R = tl.arange(0, R)
    length_R = tl.load(context_len + row_R, mask=row_R < rows, other=0)
    start_R = row_R
    count_R = (length_R > 0).to(tl.int32)
    if query_len is not None:
        start_R = tl.load(query_start + row_R, mask=row_R < rows, other=0)
        count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    if not OWN:
        count_R = tl.where(length_R > count_R, count_R, 0)
    if tl.sum(count_R, 0) < tokens:
        WIDTH: tl.constexpr = HEADS * RANK
        STEP: tl.constexpr = 2048
        c = tl.arange(0, STEP)
        token = tl.program_id(0)
        while token < tokens:
            if tl.sum(((start_R <= token) & (token < start_R + count_R)).to(tl.int32), 0) == 0:
                out = y + token.to(tl.int64) * y_stride
                for column in range(0, WIDTH, STEP):
                    zero = tl.zeros((STEP,), y.dtype.element_ty)
                    tl.store(out + column + c, zero, mask=column + c < WIDTH)
                if log_sum is not None:
                    h = tl.arange(0, triton.next_power_of_2(HEADS))
                    none = tl.full(h.shape, float("-inf"), tl.float32)
                    tl.store(log_sum + token.to(tl.int64) * log_stride + h, none, mask=h < HEADS)
            token += tl.num_programs(0)
