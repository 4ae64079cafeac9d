"""Projection of 8-bit floats for few rows: every multiprocessor streams the same share of the weights.

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
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.gemm.linear_stream_triton import _prefetch


@triton.jit
def _write(acc_TN, x_scale, weight_scale, bias, y, t, n, T, N, y_stride, GROUPED: tl.constexpr):
    """Store finished sums of rows ``t`` and outputs ``n``, scaled here unless every group was."""
    inside_t, inside_n = t < T, n < N
    if not GROUPED:
        rows = tl.load(x_scale + t, mask=inside_t, other=0.0)
        columns = tl.load(weight_scale + n, mask=inside_n, other=0.0)
        acc_TN = acc_TN * rows[:, None] * columns[None, :]
    if bias is not None:
        acc_TN += tl.load(bias + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    out = y + t.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(out, acc_TN.to(y.dtype.element_ty), mask=inside_t[:, None] & inside_n[None, :])


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
    x_stride,
    scale_stride,
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

    Args:
        x, weight: e4m3; TMA descriptors with blocks ``[BT, BK]`` and ``[BN, BK]`` where ``TMA``, else pointers.
        weight_start: pointer to the weights.
        x_scale, weight_scale: fp32, ``[T, K // BK]`` and ``[N / 128, K // BK]`` where ``GROUPED`` (BK is then
            128, the side of a group), else ``[T]`` and ``[N]``.
        bias: pointer or None.
        partial: fp32 scratch, ``[blocks, 2, BN, BT]``; None where no tile is shared.
        arrived: int32 zeros, ``[tiles]``, zeros again at the end; None where no tile is shared.
        x_stride, scale_stride, y_stride: elements from one row to the next of x, of ``x_scale``, of y.
        AHEAD: bytes of each weight row to bring to L2 while the kernel before still runs.
        PDL: this launch may start before the one ahead of it ends.
    """
    tiles_t = tl.cdiv(T, BT)
    steps = tl.cdiv(K, BK)
    units = tiles_t * tl.cdiv(N, BN) * steps
    share = tl.cdiv(units, tl.num_programs(0))
    pid = tl.program_id(0)
    begin = pid * share
    end = tl.minimum(units, begin + share)
    of_t, of_n = tl.arange(0, BT), tl.arange(0, BN)

    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            # Rows past N repeat the last one. What is fetched may end in a tile's next rows' units: harmless.
            first = begin // steps
            k0 = (begin - first * steps) * BK
            row = tl.minimum(first // tiles_t * BN + of_n, N - 1).to(tl.int64)
            nbytes = tl.minimum(tl.minimum(K - k0, share * BK), AHEAD)
            if nbytes > 0:
                _prefetch(weight_start + row * K + k0, nbytes)
        gdc_wait()

    if not TMA:
        of_k = tl.arange(0, BK)
    acc_NT = tl.zeros((BN, BT), tl.float32)
    if GROUPED:
        scale_T = _scales(x_scale, weight_scale, begin, steps, tiles_t, of_t, T, scale_stride, BT, BN)
    for unit in tl.range(begin, end):
        tile = unit // steps
        step = unit - tile * steps
        t0 = tile % tiles_t * BT
        n0 = tile // tiles_t * BN
        if TMA:
            w_NK = weight.load([n0, step * BK])
            x_TK = x.load([t0, step * BK])
        else:
            inside = (step * BK + of_k)[None, :] < K
            w_rows = weight + (n0 + of_n).to(tl.int64)[:, None] * K
            x_rows = x + (t0 + of_t).to(tl.int64)[:, None] * x_stride
            w_NK = tl.load(w_rows + (step * BK + of_k)[None, :], mask=(n0 + of_n < N)[:, None] & inside, other=0.0)
            x_TK = tl.load(x_rows + (step * BK + of_k)[None, :], mask=(t0 + of_t < T)[:, None] & inside, other=0.0)
        if GROUPED:
            # The next unit's scales are under way while this one is multiplied.
            unit1 = tl.minimum(unit + 1, units - 1)
            next_T = _scales(x_scale, weight_scale, unit1, steps, tiles_t, of_t, T, scale_stride, BT, BN)
            acc_NT += tl.dot(w_NK, x_TK.T) * scale_T[None, :]
            scale_T = next_T
        else:
            acc_NT = tl.dot(w_NK, x_TK.T, acc_NT)
        if step == steps - 1 or unit == end - 1:
            if step == steps - 1 and unit - step >= begin:
                _write(
                    acc_NT.T, x_scale, weight_scale, bias, y, t0 + of_t, n0 + of_n, T, N, y_stride, GROUPED
                )
            elif partial is not None:
                # Slot 1 where this block is the tile's first, slot 0 where it only goes on with it.
                slot = 2 * pid + (unit - step >= begin).to(tl.int32)
                sums = partial + slot.to(tl.int64) * (BN * BT)
                tl.store(sums + of_n[:, None] * BT + of_t[None, :], acc_NT, cache_modifier=".cg")
            acc_NT = tl.zeros((BN, BT), tl.float32)
    if partial is not None:
        _finish(
            begin, end, x_scale, weight_scale, bias, y, partial, arrived,
            T, N, y_stride, steps, share, tiles_t, BT, BN, GROUPED,
        )  # fmt: skip


@triton.jit
def _scales(
    x_scale, weight_scale, unit, steps, tiles_t, of_t, T, scale_stride, BT: tl.constexpr, BN: tl.constexpr
):
    """Scales of one unit's sums, one a token: those of the tokens times that of the square of weights."""
    tile = unit // steps
    group = unit - tile * steps
    t = tile % tiles_t * BT + of_t
    square = tl.load(weight_scale + tile // tiles_t * BN // 128 * steps + group)
    return tl.load(x_scale + t.to(tl.int64) * scale_stride + group, mask=t < T, other=0.0) * square


@triton.jit
def _finish(
    begin, end, x_scale, weight_scale, bias, y, partial, arrived,
    T, N, y_stride, steps, share, tiles_t, BT: tl.constexpr, BN: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Arrive at the first and the last tile of this block if they are shared; add up where it is the last to."""
    ROWS: tl.constexpr = BT if BT < 64 else 64  # 256 tokens at once need more registers than there are
    of_n = tl.arange(0, BN)
    # All stores of this block come before its arrival; one thread's release covers them after a barrier.
    tl.debug_barrier()
    first, last = begin // steps, (end - 1) // steps
    for tile in range(first, last + 1, tl.maximum(last - first, 1)):
        block = tile * steps // share
        blocks = (tile * steps + steps - 1) // share - block + 1
        if blocks > 1 and begin < end:
            before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
            if before == blocks - 1:
                t0, n = tile % tiles_t * BT, tile // tiles_t * BN + of_n
                for start in range(0, tl.minimum(T - t0, BT), ROWS):
                    r = start + tl.arange(0, ROWS)
                    cells = partial + of_n[:, None] * BT + r[None, :]
                    sum_NT = tl.load(cells + (2 * block + 1) * (BN * BT), cache_modifier=".cg")
                    for other in range(block + 1, block + blocks):
                        sum_NT += tl.load(cells + (2 * other).to(tl.int64) * (BN * BT), cache_modifier=".cg")
                    _write(sum_NT.T, x_scale, weight_scale, bias, y, t0 + r, n, T, N, y_stride, GROUPED)
                tl.store(arrived + tile, 0)
