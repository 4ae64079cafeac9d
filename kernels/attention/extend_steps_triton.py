"""Steps of extend attention over keys, with the running maxima of FlashAttention (Dao 2023, arXiv:2307.08691).

# M query vectors of a tile, L keys of a step, D head size (padded to a power of two)
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from makeready.kernels.attention.pages_triton import pages_of, slots_of
from makeready.kernels.attention.scales_triton import load_numbers, load_scales, scaled_scores, scaled_weights


@triton.jit
def attend_all(
    q_MD,
    k_cache,
    v_cache,
    k_tiles,
    v_tiles,
    scales,
    pages,
    head,
    scale,
    max_M,
    sum_M,
    acc_MD,
    offset_M,
    begin,
    end,
    high,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    PAIR: tl.constexpr,
    TMA: tl.constexpr,
):
    """Keys ``begin : end``, a multiple of a step, which every query sees; without ``PAIR`` where ``BITS``."""
    # Page numbers are read one step ahead, or each step would wait for two memory latencies in a row.
    page = pages_of(pages, begin, high, PAGE, L)
    if PAIR:
        page_2 = pages_of(pages, begin + L, high, PAGE, L)
    for key in range(begin, end, L * (1 + PAIR)):
        k_LD = _tile(k_cache, k_tiles, page, key, head, KV_HEADS, HEAD_DIM, BITS, PAGE, D, L, TMA)
        score_ML = tl.dot(q_MD, k_LD.to(q_MD.dtype).T)
        if BITS > 0:
            head_L = slots_of(page, key, PAGE, L) * KV_HEADS + head
            k_scale_L, k_offset_L, v_scale_L, v_offset_L = load_scales(scales, head_L, head_L >= 0, BITS)
            score_ML = scaled_scores(score_ML, q_MD, k_scale_L, k_offset_L, BITS)
        if PAIR:
            k_2_LD = _tile(k_cache, k_tiles, page_2, key + L, head, KV_HEADS, HEAD_DIM, BITS, PAGE, D, L, TMA)
            score_2_ML = tl.dot(q_MD, k_2_LD.to(q_MD.dtype).T)
            highest_M = tl.maximum(tl.max(score_ML, 1), tl.max(score_2_ML, 1))
        else:
            highest_M = tl.max(score_ML, 1)
        higher_M = tl.maximum(max_M, highest_M * scale)
        p_ML = tl.exp2(score_ML * scale - higher_M[:, None])
        shrink_M = tl.exp2(max_M - higher_M)
        sum_M = sum_M * shrink_M + tl.sum(p_ML, 1)
        if BITS == 4:
            offset_M = offset_M * shrink_M + tl.sum(p_ML * v_offset_L[None, :], 1)
        if BITS > 0:
            p_ML = scaled_weights(p_ML, v_scale_L, BITS)
        acc_MD = acc_MD * shrink_M[:, None]
        v_LD = _tile(v_cache, v_tiles, page, key, head, KV_HEADS, HEAD_DIM, BITS, PAGE, D, L, TMA)
        page = pages_of(pages, key + L * (1 + PAIR), high, PAGE, L)
        acc_MD = tl.dot(p_ML.to(q_MD.dtype), v_LD.to(q_MD.dtype), acc_MD)
        if PAIR:
            p_2_ML = tl.exp2(score_2_ML * scale - higher_M[:, None])
            sum_M += tl.sum(p_2_ML, 1)
            v_2_LD = _tile(v_cache, v_tiles, page_2, key + L, head, KV_HEADS, HEAD_DIM, BITS, PAGE, D, L, TMA)
            page_2 = pages_of(pages, key + 3 * L, high, PAGE, L)
            acc_MD = tl.dot(p_2_ML.to(q_MD.dtype), v_2_LD.to(q_MD.dtype), acc_MD)
        max_M = higher_M
    return max_M, sum_M, acc_MD, offset_M


@triton.jit
def attend_some(
    q_MD,
    k_cache,
    v_cache,
    scales,
    pages,
    head,
    position_M,
    scale,
    max_M,
    sum_M,
    acc_MD,
    offset_M,
    begin,
    end,
    high,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
):
    """Keys ``begin : end``, each seen by the queries at its position and after, inside their windows."""
    l = tl.arange(0, L)  # noqa: E741
    if WINDOW > 0:
        oldest = tl.min(position_M, 0) - WINDOW
    for key in range(begin, end, L):
        head_L = slots_of(pages_of(pages, key, high, PAGE, L), key, PAGE, L) * KV_HEADS + head
        # Slots past the row's tokens, and before all windows, may hold NaN: they are not read.
        read_L = key + l < high
        if WINDOW > 0:
            read_L &= key + l > oldest
        k_LD = load_numbers(k_cache, head_L, read_L, HEAD_DIM, D, L, BITS)
        v_LD = load_numbers(v_cache, head_L, read_L, HEAD_DIM, D, L, BITS)
        seen_ML = (key + l)[None, :] <= position_M[:, None]
        if WINDOW > 0:
            seen_ML &= (key + l)[None, :] > position_M[:, None] - WINDOW
        score_ML = tl.dot(q_MD, k_LD.to(q_MD.dtype).T)
        if BITS > 0:
            k_scale_L, k_offset_L, v_scale_L, v_offset_L = load_scales(scales, head_L, read_L, BITS)
            score_ML = scaled_scores(score_ML, q_MD, k_scale_L, k_offset_L, BITS)
        # A finite score for what is hidden: a query that sees nothing yet stays free of NaN, and what it
        # gathers is wiped out by the first key that it does see.
        score_ML = tl.where(seen_ML, score_ML * scale, -1e30)
        higher_M = tl.maximum(max_M, tl.max(score_ML, 1))
        p_ML = tl.exp2(score_ML - higher_M[:, None])
        shrink_M = tl.exp2(max_M - higher_M)
        sum_M = sum_M * shrink_M + tl.sum(p_ML, 1)
        if BITS == 4:
            offset_M = offset_M * shrink_M + tl.sum(p_ML * v_offset_L[None, :], 1)
        if BITS > 0:
            p_ML = scaled_weights(p_ML, v_scale_L, BITS)
        acc_MD = tl.dot(p_ML.to(q_MD.dtype), v_LD.to(q_MD.dtype), acc_MD * shrink_M[:, None])
        max_M = higher_M
    return max_M, sum_M, acc_MD, offset_M


@triton.jit
def _tile(
    cache,
    tiles,
    page,
    key,
    head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    TMA: tl.constexpr,
):
    """Keys or values ``[L, D]`` of the tokens from ``key`` on, all of which exist."""
    if TMA:
        x_LD = tiles.load([page, key % PAGE, head, 0]).reshape(L, D)
    elif BITS == 4:
        head_L = slots_of(page, key, PAGE, L) * KV_HEADS + head
        x_LD = load_numbers(cache, head_L, head_L >= 0, HEAD_DIM, D, L, BITS)
    else:
        d = tl.arange(0, D)
        at_LD = (slots_of(page, key, PAGE, L) * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + d[None, :]
        if D == HEAD_DIM:
            x_LD = tl.load(cache + at_LD)
        else:
            x_LD = tl.load(cache + at_LD, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return x_LD
