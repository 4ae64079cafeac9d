"""Projection of 8-bit floats or integers for few rows: every multiprocessor streams the same share of the weights.

The work is a list of units, ``BK`` of K for one output tile, tiles in order and K in order within a tile.
Each block takes one run of units of equal length, wherever tiles begin and end in it (stream-K, Osama et al.
2023, arXiv:2301.03598), in one loop, so that copies never stop between tiles. 8-bit weights are half the
bytes, so what a launch wastes at its ends counts twice as much as in 16 bits; this has no ragged last wave.

A tile that a block holds from its first unit to its last is written at once. The sums of others go to
scratch; the last block of a tile to arrive adds them in the order of K, so that the result does not depend on
who was last, and sets the tile's counter back to zero.

The weights are the left side of the product, ``acc[BN, BT] = w[BN, BK] @ x[BT, BK].T``: one Hopper matrix
instruction wants at least 64 rows on the left and takes any multiple of 8 on the right.

# T tokens, N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.gemm.linear_stream_triton import prefetch_rows


@triton.jit
def _scales(x_scale, weight_scale, unit, steps, tiles_t, T, BT: tl.constexpr, BN: tl.constexpr):
    """Scales of one unit's sums, one a token: those of the tokens times that of the square of weights."""
    tile = unit // steps
    step = unit - tile * steps
    t = tile % tiles_t * BT + tl.arange(0, BT)
    square = tl.load(weight_scale + (tile // tiles_t * BN // 128 * steps + step))
    return tl.load(x_scale + t * steps + step, mask=t < T, other=0.0) * square


@triton.jit
def _write(acc_TN, x_scale, weight_scale, bias, y, t, n, T, N, y_stride, GROUPED: tl.constexpr):
    """Store finished sums of tokens ``t`` and outputs ``n``, scaled here unless every group was; ``x_scale`` None: by
    outputs alone.
    """
    inside_t, inside_n = t < T, n < N
    acc_TN = acc_TN.to(tl.float32)
    if not GROUPED:
        if x_scale is not None:
            acc_TN *= tl.load(x_scale + t, mask=inside_t, other=0.0)[:, None]
        acc_TN *= tl.load(weight_scale + n, mask=inside_n, other=0.0)[None, :]
    if bias is not None:
        acc_TN += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    out = y + t.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(out, acc_TN.to(y.dtype.element_ty), mask=inside_t[:, None] & inside_n[None, :])


@triton.jit
def put_tile(
    acc_NT, whole, slot, x_scale, weight_scale, bias, y, partial, t0, n0, T, N, y_stride,
    BT: tl.constexpr, BN: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """The result's tile, or this block's part of its sums."""
    n, t = tl.arange(0, BN), tl.arange(0, BT)
    if whole:
        _write(acc_NT.T, x_scale, weight_scale, bias, y, t0 + t, n0 + n, T, N, y_stride, GROUPED)
    elif partial is not None:
        cells = partial + slot.to(tl.int64) * (BN * BT) + n[:, None] * BT + t[None, :]
        tl.store(cells, acc_NT, cache_modifier=".cg")


@triton.jit
def finish_tiles(
    begin, end, share, steps, tiles_t, x_scale, weight_scale, bias, y, partial, arrived, T, N, y_stride,
    BT: tl.constexpr, BN: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Arrive at the first and the last tile of this block if they are shared; add up where it is the last to."""
    WIDTH: tl.constexpr = min(BT, 64)  # more at once would need more registers than the product does
    of_n = tl.arange(0, BN)
    # All stores of this block come before its arrival; one thread's release covers them after a barrier.
    tl.debug_barrier()
    first, last = begin // steps, (end - 1) // steps
    for tile in range(first, last + 1, tl.maximum(last - first, 1)):
        block = tile * steps // share
        after = (tile * steps + steps - 1) // share + 1
        if after - block > 1:
            before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
            if before == after - block - 1:
                t0, n = tile % tiles_t * BT, tile // tiles_t * BN + of_n
                for left in range(0, tl.minimum(T - t0, BT), WIDTH):
                    t = left + tl.arange(0, WIDTH)
                    cells = partial + of_n[:, None] * BT + t[None, :]
                    sum_NT = tl.load(cells + (2 * block + 1) * (BN * BT), cache_modifier=".cg")
                    for other in range(block + 1, after):
                        sum_NT += tl.load(cells + 2 * other * (BN * BT), cache_modifier=".cg")
                    _write(sum_NT.T, x_scale, weight_scale, bias, y, t0 + t, n, T, N, y_stride, GROUPED)
                tl.store(arrived + tile, 0)


@triton.jit
def linear_fp8_stream(
    x,
    weight,
    weight_start,
    x_scale,
    weight_scale,
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
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUPED: tl.constexpr,
    AHEAD: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[T, N] = x[T, K] @ weight[N, K].T``, scaled, ``+ bias[N]``.

    The grid is one axis of ``ceil(units / share)`` blocks.

    Args:
        x, weight: e4m3 or int8; TMA descriptors with blocks ``[BT, BK]`` and ``[BN, BK]`` where ``TMA``, else
            pointers.
        weight_start: pointer to the weights.
        x_scale, weight_scale: fp32, ``[T, K // 128]`` and ``[ceil(N / 128), K // 128]`` where ``GROUPED``
            (``BK`` is then 128 and ``BN`` divides it), else ``[T]`` and ``[N]``.
        bias: pointer or None.
        partial: scratch of fp32, for int8 of int32, ``[blocks, 2, BN, BT]``; None where no tile is shared. Of two
            parts, the first is of a tile that another block begins, the second of one that this block begins.
        arrived: int32 zeros, ``[tiles]``, zeros again at the end; None where no tile is shared.
        share: units of a block.
        x_stride, y_stride: elements from one row to the next.
        AHEAD: bytes of each weight row to bring to L2 while the kernel before still runs.
        PDL: this launch may start before the one ahead of it ends.
    """
    tiles_t = tl.cdiv(T, BT)
    steps = tl.cdiv(K, BK)
    units = tiles_t * tl.cdiv(N, BN) * steps
    pid = tl.program_id(0)
    begin = pid * share
    end = tl.minimum(units, begin + share)
    of_t, of_n, of_k = tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BK)

    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            first = begin // steps
            start = (begin - first * steps) * BK
            nbytes = tl.minimum(tl.minimum(K - start, share * BK), AHEAD)
            prefetch_rows(weight_start, first // tiles_t * BN + of_n, N, K, start, nbytes)
        gdc_wait()

    SUM: tl.constexpr = tl.int32 if weight_start.dtype.element_ty == tl.int8 else tl.float32
    acc_NT = tl.zeros((BN, BT), SUM)
    if GROUPED:
        scale_T = _scales(x_scale, weight_scale, begin, steps, tiles_t, T, BT, BN)
    for unit in tl.range(begin, end):
        tile = unit // steps
        step = unit - tile * steps
        t0 = tile % tiles_t * BT
        n0 = tile // tiles_t * BN
        if TMA:
            w_NK = weight.load([n0, step * BK])
            x_TK = x.load([t0, step * BK])
        else:
            n, t, k = n0 + of_n, t0 + of_t, step * BK + of_k
            inside = (k < K)[None, :]
            w_cells = weight + n.to(tl.int64)[:, None] * K + k[None, :]
            w_NK = tl.load(w_cells, mask=(n < N)[:, None] & inside, other=0.0)
            x_cells = x + t.to(tl.int64)[:, None] * x_stride + k[None, :]
            x_TK = tl.load(x_cells, mask=(t < T)[:, None] & inside, other=0.0)
        if GROUPED:
            # The next unit's scales are under way while this one is multiplied.
            after = tl.minimum(unit + 1, units - 1)
            after_T = _scales(x_scale, weight_scale, after, steps, tiles_t, T, BT, BN)
            acc_NT += tl.dot(w_NK, x_TK.T) * scale_T[None, :]
            scale_T = after_T
        else:
            acc_NT = tl.dot(w_NK, x_TK.T, acc_NT, out_dtype=SUM)
        if step == steps - 1 or unit == end - 1:
            begun = unit - step >= begin
            whole = begun and step == steps - 1
            slot = 2 * pid + begun.to(tl.int32)
            put_tile(
                acc_NT, whole, slot, x_scale, weight_scale, bias, y, partial, t0, n0, T, N, y_stride,
                BT, BN, GROUPED,
            )  # fmt: skip
            acc_NT = tl.zeros((BN, BT), SUM)
    if partial is not None:
        finish_tiles(
            begin, end, share, steps, tiles_t, x_scale, weight_scale, bias, y, partial, arrived, T, N, y_stride,
            BT, BN, GROUPED,
        )  # fmt: skip
