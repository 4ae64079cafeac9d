"""Second launch of sampling: one block a row draws its token from what the chunks left.

# R rows, V vocabulary, L length of a context, B biases of a slot
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.sample.numeric_triton import (
    LOWEST,
    exp_gap,
    from_key,
    gaps,
    noise_key,
    order_key,
    pack,
    packed_id,
    packed_key,
    scores,
)
from makeready.kernels.sample.rows_triton import is_changed
from makeready.kernels.sample.sample import NOT_FINITE
from makeready.kernels.sample.select_triton import (
    group_pivot,
    list_groups,
    listed_logits,
    threshold,
    weigh,
)

_NOBODY = tl.constexpr(-(2**63))
_NOT_FINITE = tl.constexpr(NOT_FINITE)


@triton.jit
def _total_mass(best, mass, chunks, largest, heat, WIDTH: tl.constexpr):
    """Mass of the row: its chunks', each scaled to the row's largest logit, which moves it by 1e-7 at most."""
    c = tl.arange(0, WIDTH)
    chunk_peak = from_key(packed_key(tl.load(best + c, mask=c < chunks, other=0)))
    share = exp_gap(gaps(chunk_peak, largest, heat)).to(tl.float64)
    held = tl.load(mass + c, mask=c < chunks, other=0).to(tl.float64)
    return tl.sum((share * held).to(tl.int64), 0)


@triton.jit
def _winner_of_all(z_row, drawn, chunks, largest, heat, key, WIDTH: tl.constexpr):
    """Packed winner among all tokens, which is one of the chunks' winners."""
    c = tl.arange(0, WIDTH)
    ids = tl.load(drawn + c, mask=c < chunks, other=0)
    z = tl.load(z_row + ids, mask=c < chunks, other=float("-inf"))
    score = scores(gaps(z, largest, heat), ids, key)
    return tl.max(tl.where(c < chunks, pack(score, ids), _NOBODY), 0)


@triton.jit
def _winner_from(
    z_row, groups, listed, low, largest, heat, least, key, V, GROUP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Packed winner among the listed tokens from the order key ``low`` up that min-p keeps."""
    winner = tl.full((TILE, GROUP), _NOBODY, tl.int64)
    next_z, next_ids = listed_logits(z_row, groups, listed, 0, V, GROUP, TILE)
    for at in range(0, listed, TILE):
        z, ids = next_z, next_ids
        next_z, next_ids = listed_logits(z_row, groups, listed, at + TILE, V, GROUP, TILE)
        gap = gaps(z, largest, heat)
        survives = (ids < V) & (order_key(z) >= low.to(tl.int32))
        survives = survives & (exp_gap(gap) >= tl.minimum(least, 1.0))  # always, where min-p is off
        winner = tl.maximum(winner, tl.where(survives, pack(scores(gap, ids, key), ids), _NOBODY))
    return tl.max(winner)


@triton.jit
def _lowest_of_min_p(largest, heat, least):
    """An order key below all that min-p keeps, by more than could be rounded; LOWEST where it is off."""
    low = tl.full((), LOWEST, tl.int64)
    if least > 0:
        bound = heat * (tl.log(least) * 1.00001 - 1e-4)
        bound = largest + bound - 1e-6 * (tl.abs(largest) + tl.abs(bound))
        low = tl.minimum(order_key(bound), order_key(largest)).to(tl.int64)
    return low


@triton.jit
def _draw_nucleus(
    z_row, winner, total, largest, heat, p, least, key, peaks, groups, V, all_groups,
    GROUP: tl.constexpr, TILE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Packed winner among the survivors of top-p and min-p, found without their threshold.

    The winner of all tokens is the nucleus's too, if the tokens above it hold less than ``p`` of the mass. If
    not, the nucleus lies above it: the winner of what is above is the next to be asked. With logits so flat
    that nearly all tokens survive, p of all rows need one look at their logits, the others two more or four.

    Args:
        winner: packed winner among all tokens.
        total: mass of the row.
    """
    needed = p.to(tl.float64) * total.to(tl.float64)
    pivot = _lowest_of_min_p(largest, heat, least)
    if least > 0:
        listed = list_groups(peaks, all_groups, pivot, groups, KEPT)
        winner = _winner_from(z_row, groups, listed, pivot, largest, heat, least, key, V, GROUP, TILE)
    asking = True
    while asking:
        z = tl.load(z_row + tl.minimum(packed_id(winner), V - 1))
        pivot = tl.maximum(order_key(z).to(tl.int64), pivot) + 1
        listed = list_groups(peaks, all_groups, pivot, groups, KEPT)
        count, weight = weigh(z_row, groups, listed, pivot, False, largest, heat, V, GROUP, TILE)
        asking = (weight.to(tl.float64) >= needed) & (count > 0)
        if asking:
            winner = _winner_from(z_row, groups, listed, pivot, largest, heat, least, key, V, GROUP, TILE)
    return winner


@triton.jit
def _draw_filtered(
    z_row, largest, heat, k, p, least, key, peaks, groups, kept, V, all_groups, GROUP: tl.constexpr,
    GROUPS_WIDTH: tl.constexpr, TILE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Packed winner among the survivors of top-k, then top-p, and min-p, or of min-p alone.

    All pointers are at the row's own.

    Args:
        k, p, least: of top-k (off unless in 1 .. V-1), top-p (off from 1) and min-p (off until 0).
        key: of the noise.
    """
    by_k = (k > 0) & (k < V)
    top = order_key(largest).to(tl.int64) + 1
    no_tokens, no_mass = tl.full((), 0, tl.int32), tl.full((), 0, tl.int64)
    low = tl.full((), LOWEST, tl.int64)
    if by_k:
        # k groups that reach a pivot have k tokens that do.
        if k < all_groups:
            low = group_pivot(peaks, all_groups, k, GROUPS_WIDTH)
    else:
        low = _lowest_of_min_p(largest, heat, least)
    listed = list_groups(peaks, all_groups, low, groups, KEPT)
    if by_k:
        for stage in range(tl.where(p < 1, 2, 1)):
            by_count = stage == 0
            if by_count == 0:
                listed = list_groups(peaks, all_groups, low, groups, KEPT)
            count, weight = weigh(z_row, groups, listed, low, by_count, largest, heat, V, GROUP, TILE)
            needed = k.to(tl.float64)
            if by_count == 0:
                needed = p.to(tl.float64) * weight.to(tl.float64)
            low = threshold(
                z_row, groups, listed, kept, low, count, top, no_tokens, no_mass, needed,
                by_count, largest, heat, V, GROUP, TILE, KEPT,
            )  # fmt: skip
    return _winner_from(z_row, groups, listed, low, largest, heat, least, key, V, GROUP, TILE)


@triton.jit
def draw_tokens(
    logits,
    row_slot,
    context_len,
    history,
    prompt_len,
    temperature,
    top_k,
    top_p,
    min_p,
    presence_penalty,
    frequency_penalty,
    repetition_penalty,
    seed,
    min_new_tokens,
    bias_ids,
    masked,
    tokens,
    best,
    drawn,
    mass,
    peaks,
    adjusted,
    groups,
    kept,
    V,
    L,
    B,
    null_slot,
    chunks,
    logits_stride,
    B_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    KEPT: tl.constexpr,
    BRANCHES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The row's token, to ``tokens`` and, but for BRANCHES, to its history.

    See chunks_triton.py for what the scratch holds.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    slot = tl.load(row_slot + row)
    if slot == null_slot:
        tl.store(tokens + row, 0)
        return
    length = tl.load(context_len + row)
    heat = tl.load(temperature + slot)
    c = tl.arange(0, CHUNKS_WIDTH)
    winner = tl.max(tl.load(best + row * chunks + c, mask=c < chunks, other=-(2**63)), 0)
    largest = from_key(packed_key(winner))
    finite = tl.abs(largest) < float("inf")
    if (heat > 0) & finite:
        z_row = logits + row.to(tl.int64) * logits_stride
        if is_changed(
            slot, length, prompt_len, presence_penalty, frequency_penalty, repetition_penalty,
            min_new_tokens, bias_ids, masked, B, B_WIDTH,
        ):  # fmt: skip
            z_row = adjusted + row.to(tl.int64) * (CHUNK * chunks)
        k, p, least = tl.load(top_k + slot), tl.load(top_p + slot), tl.load(min_p + slot)
        key = noise_key(tl.load(seed + slot), length)
        by_k = (k > 0) & (k < V)
        groups_row = row * chunks * (CHUNK // GROUP)
        if by_k | ((p >= 1) & (least > 0)):
            winner = _draw_filtered(
                z_row, largest, heat, k, p, least, key, peaks + groups_row, groups + groups_row,
                kept + row * KEPT, V, tl.cdiv(V, GROUP), GROUP, GROUPS_WIDTH, TILE, KEPT,
            )  # fmt: skip
        else:
            winner = _winner_of_all(z_row, drawn + row * chunks, chunks, largest, heat, key, CHUNKS_WIDTH)
            if p < 1:
                total = _total_mass(
                    best + row * chunks, mass + row * chunks, chunks, largest, heat, CHUNKS_WIDTH
                )  # fmt: skip
                winner = _draw_nucleus(
                    z_row, winner, total, largest, heat, p, least, key, peaks + groups_row,
                    groups + groups_row, V, tl.cdiv(V, GROUP), GROUP, TILE, KEPT,
                )  # fmt: skip
    token = packed_id(winner)
    tl.store(tokens + row, tl.where(finite, token, _NOT_FINITE))
    if (length < L) & (BRANCHES == 0):
        tl.store(history + slot.to(tl.int64) * L + length, tl.where(finite, token, 0))
