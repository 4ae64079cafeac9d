"""Products of tokens with experts' packed weights (integers, 4-bit floats): tiles found on the device.

As grouped_tiles_triton.py; words are widened in registers as in gemm/linear_int_stream_triton.py.

# M entries, E experts, N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.gemm.int_values_triton import centred, of_group, scaled
from makeready.kernels.moe.grouped_tiles_triton import find_tile, gated, with_bias
from makeready.kernels.mx_values_triton import mx_values


@triton.jit
def multiply_span(
    acc_NT, w_rows, scale, zero, x_TK, n, k, groups,
    MX: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SUMS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """``acc_NT`` and the products of one span of inputs; its sums are scaled where ``SUMS``, else its weights."""
    w = tl.load(w_rows + k // 128 * (8 * BITS) + tl.arange(0, 8 * BITS)[None, :])
    if MX:
        w_NK = mx_values(w, scale, n, k, groups, KIND)
    else:
        w_NK = centred(w, zero, n, k, groups, BITS, GROUP, KIND)
    if MX:
        acc_NT = tl.dot(w_NK, x_TK.T, acc_NT)
    elif SUMS:
        own = tl.load(of_group(scale, n, k, groups, GROUP)).to(tl.float32)
        acc_NT += tl.dot(w_NK, x_TK.T) * own[:, None]
    else:
        acc_NT = tl.dot(scaled(w_NK, scale, zero, n, k, groups, GROUP, KIND), x_TK.T, acc_NT)
    return acc_NT


@triton.jit
def grouped_packed(
    x,
    weight,
    weight_scale,
    weight_zero,
    weight_global_scale,
    order,
    start,
    bias,
    y,
    M,
    N,
    K,
    x_stride,
    y_stride,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP_K: tl.constexpr,
    MX: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[j] = x[row of j] @ ((weight[expert of j] - zero) * scale).T + bias``; zeros behind the last of them.

    Args:
        weight: int16 words of kernels/integers.py.
        weight_scale, weight_zero: tiles of fp16 and uint8 of every expert; zeros None where weights are symmetric,
            fp16 where they are offsets.
        weight_global_scale: fp32 of every expert's outputs, or None.
        bias: of every expert's outputs, or None.
        order: None where ``TOP_K`` is 0 and rows of x are the entries.
        N: columns of y; experts have as many outputs, or twice as many where there is a gate.
        EP: E rounded up to a power of two.
        MX: weights are e2m1 and scales e8m0 or pairs of e4m3, of 32 inputs each; BITS is 4, GROUP 32.
        GROUP: inputs that share a scale: 16, 32, 64, a multiple of 128, or what is at least K.
        GATE, ALPHA, LIMIT: as in grouped_tiles_triton.py.
        PDL: this launch may start before the one ahead of it ends.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    GATED: tl.constexpr = GATE is not None
    HALVES: tl.constexpr = 2 if GATED else 1
    SUMS: tl.constexpr = GROUP % 128 == 0 and BT <= 32
    KIND: tl.constexpr = x.dtype.element_ty
    e = tl.arange(0, EP)
    begin = tl.load(start + tl.minimum(e, E))
    end = tl.load(start + tl.minimum(e + 1, E))
    tiles_n = tl.cdiv(N, BN)
    total = tl.sum(tl.cdiv(end - begin, BT), 0) * tiles_n
    of_t, of_n, of_k = tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, 128)
    words = tl.cdiv(K, 128) * (8 * BITS)
    groups = tl.cdiv(K, GROUP)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, stop, column = find_tile(tile, begin, end, tiles_n, E, EP, BT)
        j = first + of_t
        n = tl.minimum(column * BN + of_n, N - 1)
        inside = j < stop
        row = tl.load(order + j, mask=inside, other=0) // TOP_K if TOP_K > 0 else j
        x_rows = x + row.to(tl.int64)[:, None] * x_stride
        w_rows = weight + (expert.to(tl.int64) * (HALVES * N) + n)[:, None] * words
        tiled = expert.to(tl.int64) * (tl.cdiv(HALVES * N, 64) * groups * 64)
        scale = weight_scale + tiled
        zero = None
        if weight_zero is not None:
            zero = weight_zero + tiled
        acc_NT = tl.zeros((BN, BT), tl.float32)
        up_NT = tl.zeros((BN, BT), tl.float32)
        for k in tl.range(0, K, 128):
            of = (k + of_k)[None, :]
            x_TK = tl.load(x_rows + of, mask=inside[:, None] & (of < K), other=0.0)
            acc_NT = multiply_span(
                acc_NT, w_rows, scale, zero, x_TK, n, k, groups, MX, BITS, GROUP, SUMS, KIND
            )
            if GATED:
                up_rows = w_rows + N.to(tl.int64) * words
                up_NT = multiply_span(
                    up_NT, up_rows, scale, zero, x_TK, N + n, k, groups, MX, BITS, GROUP, SUMS, KIND
                )
        if weight_global_scale is not None:
            whole = weight_global_scale + expert * (HALVES * N)
            acc_NT *= tl.load(whole + n)[:, None]
            if GATED:
                up_NT *= tl.load(whole + N + n)[:, None]
        of_expert = bias
        if bias is not None:
            of_expert += expert * (HALVES * N)
            acc_NT = with_bias(acc_NT, of_expert, n, N)
        if GATED:
            if bias is not None:
                up_NT = with_bias(up_NT, of_expert + N, n, N)
            acc_NT = gated(acc_NT, up_NT, GATE, ALPHA, LIMIT, y.dtype.element_ty)
        at = column * BN + of_n
        out = y + j.to(tl.int64)[:, None] * y_stride + at[None, :]
        tl.store(out, acc_NT.T.to(y.dtype.element_ty), mask=inside[:, None] & (at < N)[None, :])

    last = tl.load(start + E)
    for tile in range(tl.program_id(0), tl.cdiv(M - last, BT) * tiles_n, tl.num_programs(0)):
        j, at = last + tile // tiles_n * BT + of_t, tile % tiles_n * BN + of_n
        out = y + j.to(tl.int64)[:, None] * y_stride + at[None, :]
        tl.store(out, tl.zeros((BT, BN), y.dtype.element_ty), mask=(j < M)[:, None] & (at < N)[None, :])
