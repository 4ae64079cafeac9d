"""Second launch of sampling: one block a row draws its token from what the chunks left.

# R rows, V vocabulary, L length of a context, B biases of a slot
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

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
from makeready.kernels.sample.rows_triton import is_biased, is_penalised
from makeready.kernels.sample.select_triton import (
    group_pivot,
    list_groups,
    listed_logits,
    threshold,
    weigh,
)

_FIRST_LOOK = tl.constexpr(64)  # groups; then four times as many, until their tokens hold top_p


@triton.jit
def _total_mass(best, mass, chunks, largest, heat, WIDTH: tl.constexpr):
    """Mass of the row: its chunks', each scaled to the row's largest logit, which moves it by 1e-7 at most."""
    c = tl.arange(0, WIDTH)
    chunk_peak = from_key(packed_key(tl.load(best + c, mask=c < chunks, other=0)))
    share = exp_gap(gaps(chunk_peak, largest, heat)).to(tl.float64)
    held = tl.load(mass + c, mask=c < chunks, other=0).to(tl.float64)
    return tl.sum((share * held).to(tl.int64), 0)


@triton.jit
def _draw_filtered(
    z_row, largest, heat, k, p, least, key, best, mass, peaks, groups, kept, V, chunks, all_groups,
    CHUNKS_WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPS_WIDTH: tl.constexpr, TILE: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Packed winner among the survivors of top-k, top-p and min-p, all pointers at the row's own.

    Args:
        k, p, least: of top-k (off unless in 1 .. V-1), top-p (off from 1) and min-p (off until 0).
        key: of the noise.
    """
    by_k, by_p = (k > 0) & (k < V), p < 1
    no_tokens, no_mass = tl.full((), 0, tl.int32), tl.full((), 0, tl.int64)
    low, top = tl.full((), LOWEST, tl.int64), order_key(largest).to(tl.int64) + 1
    if (by_k | by_p) == 0:
        # min-p alone: lower than the lowest survivor by more than all that could be rounded.
        bound = heat * (tl.log(least) * 1.00001 - 1e-4)
        bound = largest + bound - 1e-6 * (tl.abs(largest) + tl.abs(bound))
        low = tl.minimum(order_key(bound).to(tl.int64), top - 1)

    listed = 0
    for stage in range(2):
        by_count = stage == 0
        if tl.where(by_count, by_k, by_p | (by_k == 0)):
            # k groups that reach a pivot have k tokens that do. After top-k, all that it left is looked at.
            wanted = tl.where(by_count, k, tl.where(by_k | (by_p == 0), all_groups, _FIRST_LOOK))
            needed = k.to(tl.float64)
            if by_count == 0:
                needed = tl.full((), float("inf"), tl.float64)
                if by_p & (by_k == 0):
                    total = _total_mass(best, mass, chunks, largest, heat, CHUNKS_WIDTH)
                    needed = p.to(tl.float64) * total.to(tl.float64)
            pivot, count, weight = top, no_tokens, no_mass
            high, count_high, weight_high = top, no_tokens, no_mass
            looking = True
            while looking:
                high, count_high, weight_high = pivot, count, weight
                pivot = low
                if wanted < all_groups:
                    pivot = tl.maximum(group_pivot(peaks, all_groups, wanted, GROUPS_WIDTH), low)
                listed = list_groups(peaks, all_groups, pivot, groups, KEPT)
                count, weight = weigh(z_row, groups, listed, pivot, by_count, largest, heat, V, GROUP, TILE)
                if by_p & by_k & (by_count == 0):
                    needed = p.to(tl.float64) * weight.to(tl.float64)
                looking = (weight.to(tl.float64) < needed) & (pivot > low)
                wanted *= 4
            low = pivot
            if weight.to(tl.float64) >= needed:
                low = threshold(
                    z_row, groups, listed, kept, pivot, count, high, count_high, weight_high, needed,
                    by_count, largest, heat, V, GROUP, TILE, KEPT,
                )  # fmt: skip

    winner = tl.full((TILE, GROUP), -(2**63), tl.int64)
    for at in range(0, listed, TILE):
        z, ids, present = listed_logits(z_row, groups, listed, at, V, GROUP, TILE)
        gap = gaps(z, largest, heat)
        survives = present & (order_key(z) >= low.to(tl.int32))
        survives = survives & (exp_gap(gap) >= tl.minimum(least, 1.0))  # always, where min-p is off
        packed = pack(scores(gap, ids, key), ids)
        winner = tl.maximum(winner, tl.where(survives, packed, -(2**63)))
    return tl.max(winner)


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
    PDL: tl.constexpr,
):
    """The row's token, to ``tokens`` and to its history. See chunks_triton.py for what the scratch holds."""
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
    if (heat > 0) & (largest == largest):
        prompt = tl.load(prompt_len + slot)
        changed = is_penalised(
            tl.load(presence_penalty + slot),
            tl.load(frequency_penalty + slot),
            tl.load(repetition_penalty + slot),
        )
        changed = changed | (length - prompt < tl.load(min_new_tokens + slot))
        changed = changed | is_biased(bias_ids, slot, B, B_WIDTH)
        z_row = logits + row.to(tl.int64) * logits_stride
        if changed:
            z_row = adjusted + row.to(tl.int64) * (CHUNK * chunks)
        k, p, least = tl.load(top_k + slot), tl.load(top_p + slot), tl.load(min_p + slot)
        key = noise_key(tl.load(seed + slot), length)
        groups_row = row * chunks * (CHUNK // GROUP)
        if ((k > 0) & (k < V)) | (p < 1) | (least > 0):
            winner = _draw_filtered(
                z_row, largest, heat, k, p, least, key, best + row * chunks, mass + row * chunks,
                peaks + groups_row, groups + groups_row, kept + row * KEPT, V, chunks, tl.cdiv(V, GROUP),
                CHUNKS_WIDTH, GROUP, GROUPS_WIDTH, TILE, KEPT,
            )  # fmt: skip
        else:
            ids = tl.load(drawn + row * chunks + c, mask=c < chunks, other=0)
            z = tl.load(z_row + ids, mask=c < chunks, other=float("-inf"))
            score = scores(gaps(z, largest, heat), ids, key)
            winner = tl.max(tl.where(c < chunks, pack(score, ids), -(2**63)), 0)
    token = tl.minimum(packed_id(winner), V - 1)  # NaNs may order below the padding
    tl.store(tokens + row, token)
    if length < L:
        tl.store(history + slot.to(tl.int64) * L + length, token)
