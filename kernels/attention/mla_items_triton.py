"""The line of items that blocks of latent attention share: whose they are, and where each begins.

letters as in :mod:`~makeready.kernels.attention.mla_latents_triton`
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def line(
    query_len, context_len, row_R, rows, HEADS: tl.constexpr, OWN: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Where every row's work ends in the line of all, how much of it is the row's, and all of it."""
    length_R = tl.load(context_len + row_R, mask=row_R < rows, other=0)
    if query_len is None:
        count_R = (length_R > 0).to(tl.int32)
    else:
        count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    keys_R = length_R if OWN else length_R - count_R
    work_R = tl.where(keys_R > 0, tl.cdiv(count_R * HEADS, N), 0)
    if SPLIT:
        work_R *= tl.cdiv(keys_R, K)
    end_R = tl.cumsum(work_R, 0)
    return end_R, work_R, tl.max(end_R, 0)


@triton.jit
def share_of(total, blocks, LEAST: tl.constexpr):
    """Key tiles of a block."""
    return tl.maximum(tl.cdiv(total, blocks), LEAST)


@triton.jit
def row_of(row, query_len, context_len, OWN: tl.constexpr):
    """Queries of a row that has work, tokens before them, and keys of the last query."""
    length = tl.load(context_len + row)
    count = length * 0 + 1
    if query_len is not None:
        count = tl.load(query_len + row)
    keys = length if OWN else length - count
    return count, length - count, keys


@triton.jit
def first_token(row, query_start):
    """Token of the row's first query."""
    start = row
    if query_start is not None:
        start = tl.load(query_start + row)
    return start


@triton.jit
def item_at(
    at, end_R, work_R, row_R, query_len, context_len, rows, OWN: tl.constexpr, K: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Row and number of the item at place ``at``, where it begins in the line, and its length there.

    Behind the end of the line it is some item. A row's last items see most keys: whole ones go from the last to the
    first, so that the short ones fill the gaps at the end.
    """
    row = tl.minimum(tl.sum((end_R <= at).to(tl.int32), 0), rows - 1)
    work = tl.sum(tl.where(row_R == row, work_R, 0), 0)
    before = tl.sum(tl.where(row_R == row, end_R, 0), 0) - work
    item = before + work - 1 - at
    begin = at
    tiles = 1
    if SPLIT:
        _, _, keys = row_of(row, query_len, context_len, OWN)
        tiles = tl.maximum(tl.cdiv(keys, K), 1)
        item = (at - before) // tiles
        begin = before + item * tiles
    return row, item, begin, tiles
