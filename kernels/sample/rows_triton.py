"""What one row of sampling asks for, and its logits after bias, minimum length and penalties.

# V vocabulary, L length of a context, E stop ids and B biases of a slot
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_PROMPT = tl.constexpr(1 << 30)  # marks a token of the prompt, beside its count as output
_SCAN = tl.constexpr(1024)  # tokens of history a step


@triton.jit
def is_biased(bias_ids, slot, B: tl.constexpr, B_WIDTH: tl.constexpr):
    """Whether the slot has a bias at all."""
    b = tl.arange(0, B_WIDTH)
    return tl.max(tl.load(bias_ids + slot * B + b, mask=b < B, other=-1), 0) >= 0


@triton.jit
def is_penalised(presence, frequency, repetition):
    """Whether any of the three penalties is on."""
    return (presence != 0.0) | (frequency != 0.0) | (repetition != 1.0)


@triton.jit
def force(
    z,
    ids,
    start,
    own,
    slot,
    muted,
    stop_ids,
    bias_ids,
    bias_values,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    E: tl.constexpr,
    E_WIDTH: tl.constexpr,
    B: tl.constexpr,
    B_WIDTH: tl.constexpr,
):
    """``z`` of the chunk from ``start`` with the slot's bias added and, if ``muted``, its stop ids at -inf.

    ``own`` is the row's scratch: what is scattered goes through memory, and no other block touches the
    chunk's part of it.
    """
    end = tl.minimum(start + CHUNK, V)
    tl.store(own + ids, z)
    tl.debug_barrier()
    b = tl.arange(0, B_WIDTH)
    biased = tl.load(bias_ids + slot * B + b, mask=b < B, other=-1)
    here = (biased >= start) & (biased < end)
    value = tl.load(bias_values + slot * B + b, mask=here, other=0.0)
    value += tl.load(own + biased, mask=here, other=0.0, cache_modifier=".cg")
    tl.debug_barrier()
    tl.store(own + biased, value, mask=here)
    tl.debug_barrier()
    if muted:
        e = tl.arange(0, E_WIDTH)
        stop = tl.load(stop_ids + slot * E + e, mask=e < E, other=-1)
        tl.store(own + stop, float("-inf"), mask=(stop >= start) & (stop < end))
        tl.debug_barrier()
    forced = tl.load(own + ids, cache_modifier=".cg")
    tl.debug_barrier()
    return forced


@triton.jit
def penalise(
    z,
    ids,
    start,
    own,
    tokens,
    prompt_len,
    length,
    presence,
    frequency,
    repetition,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``z`` of the chunk from ``start`` after the penalties of the ``length`` tokens at ``tokens``.

    ``own`` is the row's scratch as int32, where the chunk's tokens are counted.
    """
    end = tl.minimum(start + CHUNK, V)
    tl.store(own + ids, tl.zeros_like(ids))
    tl.debug_barrier()
    first = tl.where(repetition != 1.0, 0, prompt_len)  # only this penalty looks at the prompt
    for at in range(first, length, _SCAN):
        place = at + tl.arange(0, _SCAN)
        token = tl.load(tokens + place, mask=place < length, other=-1)
        here = (token >= start) & (token < end)
        tl.atomic_or(own + token, _PROMPT, mask=here & (place < prompt_len), sem="relaxed")
        tl.atomic_add(own + token, 1, mask=here & (place >= prompt_len), sem="relaxed")
    tl.debug_barrier()
    seen = tl.load(own + ids, cache_modifier=".cg")
    tl.debug_barrier()
    # Products of two fp32 numbers are exact in fp64: rounded once, and never contracted with what follows.
    if repetition != 1.0:
        scaled = (z.to(tl.float64) * repetition).to(tl.float32)
        z = tl.where(seen != 0, tl.where(z > 0, tl.div_rn(z, repetition), scaled), z)
    count = seen & (_PROMPT - 1)
    less = (count.to(tl.float64) * frequency).to(tl.float32) + presence
    return tl.where(count > 0, z - less, z)
