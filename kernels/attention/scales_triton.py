"""Caches with scales in attention kernels: what a step reads of them, and what it does to scores and weights.

Products are taken of the numbers as they are: a key's scale multiplies its scores, a value's scale its weights.
With 4 bits, whose numbers have an offset, scores get the sum of a query's features times the key's, and an output
the sum of weights times the values'.

# N query vectors, L keys of a step, D head size (padded to a power of two)
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_numbers(
    cache, head_L, read_L, HEAD_DIM: tl.constexpr, D: tl.constexpr, L: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Numbers ``[L, D]`` of the heads ``head_L`` (slot * KV heads + head), those of 4 bits as -8 .. 7.

    Zeros where ``read_L`` says no.
    """
    if BITS == 4:
        b = tl.arange(0, D // 2)
        read_LB = read_L[:, None]
        if D != HEAD_DIM:
            read_LB &= (b < HEAD_DIM // 2)[None, :]
        at_LB = (head_L * (HEAD_DIM // 2))[:, None] + b[None, :]
        pair_LB = tl.load(cache + at_LB, mask=read_LB, other=0x88)
        low_LB = (pair_LB & 15).to(tl.int8) - 8
        high_LB = (pair_LB >> 4).to(tl.int8) - 8
        x_LD = tl.join(low_LB, high_LB).reshape(L, D)
    else:
        d = tl.arange(0, D)
        read_LD = read_L[:, None]
        if D != HEAD_DIM:
            read_LD &= (d < HEAD_DIM)[None, :]
        x_LD = tl.load(cache + (head_L * HEAD_DIM)[:, None] + d[None, :], mask=read_LD, other=0.0)
    return x_LD


@triton.jit
def load_scales(scales, head_L, read_L, BITS: tl.constexpr):
    """Scales and offsets of keys and values, fp32 ``[L]`` each; zeros where ``read_L`` says no.

    Two of them are a word, which asynchronous copies can bring; halves of one they cannot.
    """
    words = scales.to(tl.pointer_type(tl.uint32))
    if BITS == 4:
        k_scale_L, k_offset_L = _halves(tl.load(words + head_L * 2, mask=read_L, other=0))
        v_scale_L, v_offset_L = _halves(tl.load(words + head_L * 2 + 1, mask=read_L, other=0))
    else:
        k_scale_L, v_scale_L = _halves(tl.load(words + head_L, mask=read_L, other=0))
        k_offset_L = k_scale_L
        v_offset_L = v_scale_L
    return k_scale_L, k_offset_L, v_scale_L, v_offset_L


@triton.jit
def _halves(word_L):
    low_L = (word_L & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high_L = (word_L >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return low_L.to(tl.float32), high_L.to(tl.float32)


@triton.jit
def scaled_scores(score_NL, q_ND, k_scale_L, k_offset_L, BITS: tl.constexpr):
    """Products of queries with keys from those with their numbers."""
    score_NL *= k_scale_L[None, :]
    if BITS == 4:
        score_NL += tl.sum(q_ND.to(tl.float32), 1)[:, None] * k_offset_L[None, :]
    return score_NL


@triton.jit
def scaled_weights(p_NL, v_scale_L, BITS: tl.constexpr):
    """Weights times the values' scales, times what :func:`unscaled` takes out again.

    A scale is a small part of the values: by itself it would leave weights in fp16's subnormal numbers.
    """
    return p_NL * (v_scale_L * (64 if BITS == 8 else 8))[None, :]


@triton.jit
def unscaled(acc_ND, BITS: tl.constexpr):
    """Sums of values from those with :func:`scaled_weights`."""
    return acc_ND * (1 / 64 if BITS == 8 else 1 / 8)
