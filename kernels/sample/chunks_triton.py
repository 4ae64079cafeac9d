"""First launch of sampling: every block looks at one chunk of one row's logits.

What it leaves for the second launch depends on what the row asks for:

    all rows              best    packed largest adjusted logit of the chunk and its id; +inf for NaN
    temperature or top-p  drawn   id of the chunk's winner among all tokens, by gaps to its largest logit
    filters               peaks   largest adjusted logit of every GROUP tokens
    top-p without top-k   mass    of the chunk, relative to its largest logit
    adjustments           the adjusted logits

Chunks do not depend on the batch, and sums are of integers: nor does any result.

# R rows, V vocabulary, L length of a context, E stop ids, B biases and W words of a mask of a slot
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.sample.numeric_triton import (
    gaps,
    masses,
    noise_key,
    pack,
    packed_id,
    scores,
)
from makeready.kernels.sample.rows_triton import adjust_chunk, is_changed, is_muted


@triton.jit
def look_at_chunks(
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
    stop_ids,
    bias_ids,
    masked,
    allowed,
    bias_values,
    path,
    path_len,
    best,
    drawn,
    mass,
    peaks,
    adjusted,
    counts,
    L,
    E,
    B,
    W,
    null_slot,
    chunks,
    V: tl.constexpr,
    E_WIDTH: tl.constexpr,
    B_WIDTH: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    DEEP: tl.constexpr,
    D_WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module's docstring; ``adjusted`` and ``counts`` are the same memory."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    start = chunk * CHUNK
    ids = start + tl.arange(0, CHUNK)
    z_row = logits + row.to(tl.int64) * LOGITS_STRIDE
    z = tl.load(z_row + ids, mask=ids < V, other=float("-inf"))
    slot = tl.load(row_slot + row)
    if slot == null_slot:
        return
    length = tl.load(context_len + row)
    heat = tl.load(temperature + slot)
    if is_changed(
        slot, length, prompt_len, presence_penalty, frequency_penalty, repetition_penalty, min_new_tokens,
        bias_ids, masked, B, B_WIDTH,
    ):  # fmt: skip
        WORDS: tl.constexpr = (V + 31) // 32
        masks = tl.maximum(W // WORDS, 1)  # where no row is masked there need be none
        own = adjusted + row.to(tl.int64) * (CHUNK * chunks)
        branch = path
        behind = 0
        if DEEP > 0:
            branch = path + row * DEEP
            behind = tl.load(path_len + row)
        adjust_chunk(
            z_row, own, counts + row.to(tl.int64) * (CHUNK * chunks), start,
            history + slot.to(tl.int64) * L, tl.load(prompt_len + slot), length,
            tl.load(presence_penalty + slot), tl.load(frequency_penalty + slot),
            tl.load(repetition_penalty + slot), is_muted(slot, length, prompt_len, min_new_tokens),
            stop_ids + slot * E, bias_ids + slot * B, bias_values + slot * B,
            tl.load(masked + slot) != 0, allowed + slot * W + length % masks * WORDS,
            branch, behind, E, B, V, CHUNK, PART, E_WIDTH, B_WIDTH, D_WIDTH,
        )  # fmt: skip
        z_row = own
        z = tl.load(z_row + ids, mask=ids < V, other=float("-inf"), cache_modifier=".cg")
    # The second launch refuses a row whose largest logit is no number. Reductions drop NaN and its bits order
    # by its sign, so it counts as +inf.
    z = tl.where(z < float("inf"), z, float("inf"))
    peak = tl.max(z, 0)
    first = tl.min(tl.where(z == peak, ids, V - 1), 0)
    place = row * chunks + chunk
    tl.store(best + place, pack(peak, first))

    if heat > 0:
        k, p = tl.load(top_k + slot), tl.load(top_p + slot)
        by_count = (k > 0) & (k < V)
        filtered = by_count | (p < 1) | (tl.load(min_p + slot) > 0)
        weighed = (p < 1) & (by_count == 0)
        key = noise_key(tl.load(seed + slot), length)
        # A part of the chunk at a time, read again: registers set how many blocks a multiprocessor holds.
        held = tl.zeros((PART,), tl.int64)
        winner = tl.full((PART,), -(2**63), tl.int64)
        for at in range(start, tl.minimum(start + CHUNK, V), PART):
            ids_part = at + tl.arange(0, PART)
            z_part = tl.load(z_row + ids_part, mask=ids_part < V, other=float("-inf"))
            gap = gaps(z_part, peak, heat)
            if filtered:
                groups: tl.constexpr = PART // GROUP
                peak_of = tl.max(tl.reshape(z_part, (groups, GROUP)), 1)
                tl.store(
                    peaks + row * (chunks * (CHUNK // GROUP)) + at // GROUP + tl.arange(0, groups), peak_of
                )
            if weighed:
                held += tl.where(ids_part < V, masses(gap), 0)
            if weighed | (filtered == 0):
                packed = pack(scores(gap, ids_part, key), ids_part)
                winner = tl.maximum(winner, tl.where(ids_part < V, packed, -(2**63)))
        if weighed:
            tl.store(mass + place, tl.sum(held, 0))
        if weighed | (filtered == 0):
            tl.store(drawn + place, packed_id(tl.max(winner, 0)))
