"""First launch of sampling: every block looks at one chunk of one row's logits.

What it leaves for the second launch depends on what the row asks for:

    all rows            best    packed largest adjusted logit of the chunk and its id
    temperature, alone  drawn   id of the chunk's winner, by gaps to the chunk's largest logit
    filters             peaks   largest adjusted logit of every GROUP tokens
    top-p without top-k mass    of the chunk, relative to its largest logit
    temperature, and adjusted   the adjusted logits

Chunks do not depend on the batch, and sums are of integers: nor does any result.

# R rows, V vocabulary, L length of a context, E stop ids and B biases of a slot
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.sample.numeric_triton import (
    from_key,
    gaps,
    masses,
    noise_key,
    pack,
    packed_id,
    packed_key,
    scores,
)
from makeready.kernels.sample.rows_triton import force, is_biased, is_penalised, penalise


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
    bias_values,
    best,
    drawn,
    mass,
    peaks,
    adjusted,
    counts,
    V: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    B: tl.constexpr,
    B_WIDTH: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    NULL_SLOT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module's docstring; ``adjusted`` and ``counts`` are the same memory."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    start = chunk * CHUNK
    ids = start + tl.arange(0, CHUNK)
    z = tl.load(logits + row.to(tl.int64) * LOGITS_STRIDE + ids, mask=ids < V, other=float("-inf"))
    slot = tl.load(row_slot + row)
    if slot == NULL_SLOT:
        return
    length = tl.load(context_len + row)
    prompt = tl.load(prompt_len + slot)
    heat = tl.load(temperature + slot)
    presence = tl.load(presence_penalty + slot)
    frequency = tl.load(frequency_penalty + slot)
    repetition = tl.load(repetition_penalty + slot)
    muted = length - prompt < tl.load(min_new_tokens + slot)
    forced = is_biased(bias_ids, slot, B, B_WIDTH) | muted
    penalised = is_penalised(presence, frequency, repetition)

    own = row.to(tl.int64) * (CHUNK * CHUNKS)
    if forced:
        z = force(
            z, ids, start, adjusted + own, slot, muted, stop_ids, bias_ids, bias_values,
            V, CHUNK, E, E_WIDTH, B, B_WIDTH,
        )  # fmt: skip
    if penalised:
        z = penalise(
            z, ids, start, counts + own, history + slot.to(tl.int64) * L, prompt, length,
            presence, frequency, repetition, V, CHUNK,
        )  # fmt: skip
    packed = tl.max(pack(z, ids), 0)
    place = row * CHUNKS + chunk
    tl.store(best + place, packed)

    if heat > 0:
        if forced | penalised:
            tl.store(adjusted + own + ids, z)
        k, p = tl.load(top_k + slot), tl.load(top_p + slot)
        by_count = (k > 0) & (k < V)
        peak = from_key(packed_key(packed))
        gap = gaps(z, peak, heat)
        if by_count | (p < 1) | (tl.load(min_p + slot) > 0):
            groups: tl.constexpr = CHUNK // GROUP
            peak_of = tl.max(tl.reshape(z, (groups, GROUP)), 1)
            tl.store(peaks + place * groups + tl.arange(0, groups), peak_of)
            if (p < 1) & (by_count == 0):
                held = tl.where(ids < V, masses(gap), 0)
                tl.store(mass + place, tl.sum(held, 0))
        else:
            key = noise_key(tl.load(seed + slot), length)
            score = tl.where(ids < V, scores(gap, ids, key), float("-inf"))
            tl.store(drawn + place, packed_id(tl.max(pack(score, ids), 0)))
