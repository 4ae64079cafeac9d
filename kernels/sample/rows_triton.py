"""What one row of sampling asks for, and its logits after bias, minimum length, penalties and mask.

# V vocabulary, L length of a context, E stop ids, B biases and W words of a mask of a slot
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_PROMPT = tl.constexpr(1 << 30)  # marks a token of the prompt, beside its count as output


@triton.jit
def is_biased(bias_ids, slot, B, B_WIDTH: tl.constexpr):
    """Whether the slot has a bias at all."""
    b = tl.arange(0, B_WIDTH)
    return tl.max(tl.load(bias_ids + slot * B + b, mask=b < B, other=-1), 0) >= 0


@triton.jit
def is_penalised(presence, frequency, repetition):
    """Whether any of the three penalties is on."""
    return (presence != 0.0) | (frequency != 0.0) | (repetition != 1.0)


@triton.jit
def is_changed(
    slot, length, prompt_len, presence_penalty, frequency_penalty, repetition_penalty, min_new_tokens,
    bias_ids, masked, B, B_WIDTH: tl.constexpr,
):  # fmt: skip
    """Whether the row of ``slot`` has logits of its own in scratch, as :func:`adjust_chunk` leaves them."""
    changed = is_penalised(
        tl.load(presence_penalty + slot),
        tl.load(frequency_penalty + slot),
        tl.load(repetition_penalty + slot),
    )
    changed = changed | is_muted(slot, length, prompt_len, min_new_tokens) | (tl.load(masked + slot) != 0)
    return changed | is_biased(bias_ids, slot, B, B_WIDTH)


@triton.jit
def is_muted(slot, length, prompt_len, min_new_tokens):
    """Whether stop ids are still held back."""
    return length - tl.load(prompt_len + slot) < tl.load(min_new_tokens + slot)


@triton.jit
def penalised(z, seen, presence, frequency, repetition):
    """``z`` after the penalties of tokens ``seen`` as :func:`adjust_chunk` counts them.

    Products of two fp32 numbers are exact in fp64: rounded once, and never contracted with what follows.
    """
    if repetition != 1.0:
        scaled = (z.to(tl.float64) * repetition).to(tl.float32)
        z = tl.where(seen != 0, tl.where(z > 0, tl.div_rn(z, repetition), scaled), z)
    count = seen & (_PROMPT - 1)
    less = (count.to(tl.float64) * frequency).to(tl.float32) + presence
    return tl.where(count > 0, z - less, z)


@triton.jit
def adjust_chunk(
    logits,
    adjusted,
    counts,
    start,
    tokens,
    prompt_len,
    length,
    presence,
    frequency,
    repetition,
    muted,
    stop_ids,
    bias_ids,
    bias_values,
    masked,
    allowed,
    path,
    path_len,
    E,
    B,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    E_WIDTH: tl.constexpr,
    B_WIDTH: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Adjusted logits of the chunk from ``start``; see :func:`~.filters.adjust`.

    What is scattered goes through the row's scratch, whose part for this chunk no other block touches: first
    it holds the tokens' counts, then their logits. Work is cut into parts to spare registers.

    Args:
        logits, tokens, stop_ids, bias_ids, bias_values, allowed: of the row.
        path, path_len: the last of its tokens, which are not among ``tokens``; DEEP is 0 where there are none.
        adjusted, counts: scratch of the row, the same memory.
        muted: whether stop ids are still held back.
        masked: whether only ``allowed`` tokens may be drawn.
    """
    end = tl.minimum(start + CHUNK, V)
    for at in range(start, end, PART):
        tl.store(counts + at + tl.arange(0, PART), tl.zeros((PART,), tl.int32))
    tl.debug_barrier()
    if is_penalised(presence, frequency, repetition):
        first = tl.where(repetition != 1.0, 0, prompt_len)  # only this penalty looks at the prompt
        known = length
        if DEEP > 0:
            known = length - path_len
            d = tl.arange(0, DEEP)
            behind = tl.load(path + d, mask=d < path_len, other=-1)
            counted = (behind >= start) & (behind < end)
            output = known + d >= prompt_len
            tl.atomic_or(counts + behind, _PROMPT, mask=counted & (output == 0), sem="relaxed")
            tl.atomic_add(counts + behind, 1, mask=counted & output, sem="relaxed")
        for at in range(first, known, PART):
            place = at + tl.arange(0, PART)
            token = tl.load(tokens + place, mask=place < known, other=-1)
            here = (token >= start) & (token < end)
            tl.atomic_or(counts + token, _PROMPT, mask=here & (place < prompt_len), sem="relaxed")
            tl.atomic_add(counts + token, 1, mask=here & (place >= prompt_len), sem="relaxed")
        tl.debug_barrier()

    b, e = tl.arange(0, B_WIDTH), tl.arange(0, E_WIDTH)
    biased = tl.load(bias_ids + b, mask=b < B, other=-1)
    has_bias = (biased >= start) & (biased < end)
    biased_z = tl.load(logits + biased, mask=has_bias, other=0.0)
    biased_z += tl.load(bias_values + b, mask=has_bias, other=0.0)
    biased_seen = tl.load(counts + biased, mask=has_bias, other=0, cache_modifier=".cg")
    biased_z = penalised(biased_z, biased_seen, presence, frequency, repetition)
    stop = tl.load(stop_ids + e, mask=e < E, other=-1)
    stops = (stop >= start) & (stop < end) & muted
    stop_seen = tl.load(counts + stop, mask=stops, other=0, cache_modifier=".cg")
    stop_z = tl.full((E_WIDTH,), float("-inf"), tl.float32)
    stop_z = penalised(stop_z, stop_seen, presence, frequency, repetition)
    tl.debug_barrier()

    for at in range(start, end, PART):
        ids = at + tl.arange(0, PART)
        z = tl.load(logits + ids, mask=ids < V, other=float("-inf"))
        seen = tl.load(counts + ids, cache_modifier=".cg")
        tl.debug_barrier()
        tl.store(adjusted + ids, penalised(z, seen, presence, frequency, repetition))
    tl.debug_barrier()
    tl.store(adjusted + biased, biased_z, mask=has_bias)
    tl.debug_barrier()
    tl.store(adjusted + stop, stop_z, mask=stops)
    tl.debug_barrier()
    if masked:
        for at in range(start, end, PART):
            ids = at + tl.arange(0, PART)
            words = tl.load(allowed + (ids >> 5), mask=ids < V, other=0)
            refused = ((words >> (ids & 31)) & 1) == 0
            tl.store(adjusted + ids, tl.full((PART,), float("-inf"), tl.float32), mask=refused)
        tl.debug_barrier()
