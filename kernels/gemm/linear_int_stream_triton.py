"""Projection with packed weights (integers, 4-bit floats) for few rows: multiprocessors stream equal shares.

As linear_fp8_stream_triton.py: units of one span of inputs for one output tile, runs of them that may end inside a
tile, and parts that the last block of a tile adds up. Words are copied by TMA, widened in registers, and are the left
side of the product, which Hopper's matrix instructions take from registers. Of few rows, where a span lies in one
group, its sums are scaled, in fp32; else the weights are. NVFP4's global scales are multiplied with finished sums.

# T tokens, N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.gemm.int_values_triton import centred, of_group, scaled
from makeready.kernels.gemm.linear_fp8_stream_triton import finish_tiles, put_tile
from makeready.kernels.gemm.linear_stream_triton import prefetch_rows
from makeready.kernels.mx_values_triton import mx_values


@triton.jit
def linear_int_stream(
    x,
    weight,
    weight_start,
    weight_scale,
    weight_zero,
    weight_global_scale,
    bias,
    y,
    partial,
    arrived,
    T,
    N,
    K,
    share,
    x_stride,
    y_stride,
    MX: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    AHEAD: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[T, N] = x[T, K] @ ((weight[N, K] - zero) * scale).T + bias[N]``.

    The grid is one axis of ``ceil(units / share)`` blocks.

    Args:
        x, weight: floats and int16 words; TMA descriptors with blocks ``[BT, 128]`` and ``[BN, 8 * BITS]`` where
            ``TMA``, else pointers.
        weight_start: pointer to the words.
        weight_scale, weight_zero: pointers to tiles of fp16 and uint8; zeros None where weights are symmetric, fp16
            where they are offsets.
        weight_global_scale, bias: pointers or None; the first to one fp32 an output.
        partial, arrived: scratch as in ``linear_fp8_stream``, or None.
        share: units of a block.
        MX: weights are e2m1 and scales e8m0 or pairs of e4m3, of 32 inputs each; BITS is 4, GROUP 32.
        GROUP: inputs that share a scale: 16, 32, 64, a multiple of 128, or what is at least K.
        AHEAD: words of each row to bring to L2 while the kernel before still runs.
        PDL: this launch may start before the one ahead of it ends.
    """
    COUNT: tl.constexpr = 8 * BITS
    SUMS: tl.constexpr = GROUP % 128 == 0 and BT <= 32  # what is scaled: sums, or the weights of a span
    KIND: tl.constexpr = x.dtype if TMA else x.dtype.element_ty
    tiles_t = tl.cdiv(T, BT)
    steps = tl.cdiv(K, 128)
    groups = tl.cdiv(K, GROUP)
    words = steps * COUNT
    units = tiles_t * tl.cdiv(N, BN) * steps
    pid = tl.program_id(0)
    begin = pid * share
    end = tl.minimum(units, begin + share)
    of_t, of_n = tl.arange(0, BT), tl.arange(0, BN)

    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            first = begin // steps
            start = (begin - first * steps) * COUNT
            ahead = tl.minimum(tl.minimum(words - start, share * COUNT), AHEAD)
            prefetch_rows(weight_start, first // tiles_t * BN + of_n, N, words, start, 2 * ahead)
        gdc_wait()

    acc_NT = tl.zeros((BN, BT), tl.float32)
    for unit in tl.range(begin, end):
        tile = unit // steps
        step = unit - tile * steps
        t0 = tile % tiles_t * BT
        n0 = tile // tiles_t * BN
        k = step * 128
        n = tl.minimum(n0 + of_n, N - 1)
        if TMA:
            w = weight.load([n0, step * COUNT])
            x_TK = x.load([t0, k])
        else:
            t, of_k = t0 + of_t, k + tl.arange(0, 128)
            w = tl.load(
                weight + n.to(tl.int64)[:, None] * words + step * COUNT + tl.arange(0, COUNT)[None, :]
            )
            cells = x + t.to(tl.int64)[:, None] * x_stride + of_k[None, :]
            x_TK = tl.load(cells, mask=(t < T)[:, None] & (of_k < K)[None, :], other=0.0)
        if MX:
            w_NK = mx_values(w, weight_scale, n, k, groups, KIND)
        else:
            w_NK = centred(w, weight_zero, n, k, groups, BITS, GROUP, KIND)
        if MX:
            acc_NT = tl.dot(w_NK, x_TK.T, acc_NT)
        elif SUMS:
            own = tl.load(of_group(weight_scale, n, k, groups, GROUP)).to(tl.float32)
            acc_NT += tl.dot(w_NK, x_TK.T) * own[:, None]
        else:
            acc_NT = tl.dot(
                scaled(w_NK, weight_scale, weight_zero, n, k, groups, GROUP, KIND), x_TK.T, acc_NT
            )
        if step == steps - 1 or unit == end - 1:
            begun = unit - step >= begin
            whole = begun and step == steps - 1
            slot = 2 * pid + begun.to(tl.int32)
            put_tile(
                acc_NT, whole, slot, None, weight_global_scale, bias, y, partial, t0, n0, T, N, y_stride,
                BT, BN, weight_global_scale is None,
            )  # fmt: skip
            acc_NT = tl.zeros((BN, BT), tl.float32)
    if partial is not None:
        finish_tiles(
            begin, end, share, steps, tiles_t, None, weight_global_scale, bias, y, partial, arrived, T, N, y_stride,
            BT, BN, weight_global_scale is None,
        )  # fmt: skip
