"""What blocks of extend attention have to do: one line of items, and the keys of each.

Vectors come from the caller, so that these functions serve Triton and Gluon, where every vector has a layout.

# T tokens, R rows, M query vectors of a tile, L keys of a step, D head size (padded to a power of two)
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clear_idle(
    y, query_start, query_len, rows, tokens, y_stride, row_R, m, d, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Zeros for tokens of no row, by all blocks of the launch; ``row_R``, ``m`` and ``d`` count from 0."""
    TOKENS: tl.constexpr = M // GROUP
    count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    if tl.sum(count_R, 0) < tokens:
        start_R = tl.load(query_start + row_R, mask=row_R < rows, other=0)
        tile = tl.program_id(0)
        while tile < tl.cdiv(tokens, TOKENS) * KV_HEADS:
            token_M = tile // KV_HEADS * TOKENS + m // GROUP
            after_MR = start_R[None, :] <= token_M[:, None]
            of_row_MR = after_MR & (token_M[:, None] < (start_R + count_R)[None, :])
            idle_M = (tl.sum(of_row_MR.to(tl.int32), 1) == 0) & (token_M < tokens) & (m < TOKENS * GROUP)
            head_MD = (tile % KV_HEADS * GROUP + m % GROUP)[:, None] * HEAD_DIM + d[None, :]
            at_MD = token_M.to(tl.int64)[:, None] * y_stride + head_MD
            tl.store(y + at_MD, 0.0, mask=idle_M[:, None] & (d < HEAD_DIM)[None, :])
            tile += tl.num_programs(0)


@triton.jit
def item_at(
    at, query_len, context_len, rows, row_R, KV_HEADS: tl.constexpr, WINDOW: tl.constexpr,
    TOKENS: tl.constexpr, L: tl.constexpr, SHARES: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Whether there is an item at place ``at``, and its head, row, tile and part of the row, most keys
    of a part, and the slot of the tile's part 0 (part i has ``i * KV_HEADS`` more). ``row_R`` counts from 0.
    """
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
def tokens_of(tile, count, m, M: tl.constexpr, GROUP: tl.constexpr):
    """Tokens of the row that the query vectors ``m`` of a tile belong to, and which of them exist."""
    token_M = tile * (M // GROUP) + m // GROUP
    return token_M, (token_M < count) & (m < M // GROUP * GROUP)


@triton.jit
def span(
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


@triton.jit
def run_at(pages, key, length, PAGE: tl.constexpr, RUN: tl.constexpr):
    """Page and first slot of a copy of ``RUN`` slots that brings the tokens from ``key`` on, a multiple of RUN.

    A run that the row's end cuts short is copied so that it ends with the last token: its first places then lie
    before the page, where tensor maps give zeros, or hold tokens before ``key``. So no slot without a token is
    read. Of a run behind the row's end all places lie before the page.
    """
    page = tl.load(pages + tl.minimum(key, length - 1) // PAGE)
    there = tl.minimum(length - key, RUN)
    return page, tl.where(there > 0, key % PAGE + there - RUN, -RUN)


@triton.jit
def keys_of(key, length, places, RUN: tl.constexpr):
    """Tokens at ``places`` of runs from ``key`` on, copied as :func:`run_at` says, and which of them are theirs."""
    run = key + places // RUN * RUN
    short = run + RUN - tl.maximum(length, run)
    token = key + places - tl.maximum(short, 0)
    return token, token >= run
