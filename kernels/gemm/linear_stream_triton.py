"""Dense projection for few rows: the weights are streamed once, which is all that such a product costs.

A block owns ``BN`` outputs for ``BT`` rows over one of ``SPLIT`` ranges of K. The weights are the left side
of the product, ``acc[BN, BT] = w[BN, BK] @ x[BT, BK].T``: one Hopper matrix instruction wants at least 64
rows on the left and takes any multiple of 8 on the right, so few tokens waste nothing.

Splitting K gives every multiprocessor the same bytes to stream where N / BN blocks would not. Each block
leaves its sums in scratch; the last of a tile to arrive adds them in the order of K, so the result does not
depend on who was last, and sets the tile's counter back to zero.

Tile sides are powers of two, but a second accumulator makes tiles of 192 outputs: 256 tokens by 24,576
outputs are then 256 tiles of 128 rows, nearly two waves of 132 multiprocessors, where 128 make 384 and a
third wave.

# T tokens, N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.prefetch_triton import prefetch


@triton.jit
def prefetch_rows(weight, row, rows, K, begin, nbytes):
    """:func:`prefetch` from column ``begin`` of each ``row``; those past the last repeat it."""
    inside = tl.minimum(row, rows - 1).to(tl.int64)
    prefetch(weight + inside * K + begin, nbytes)


@triton.jit
def _bias(bias, n, N):
    return tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def _store(y, acc_TN, bias_N, t, n, T, N, y_stride):
    """Write ``acc_TN + bias_N`` to rows ``t`` and columns ``n`` of ``y``, as far as they exist."""
    if bias_N is not None:
        acc_TN += bias_N[None, :]
    valid = (t < T)[:, None] & (n < N)[None, :]
    out = y + t.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(out, acc_TN.to(y.dtype.element_ty), mask=valid)


@triton.jit
def linear_stream(
    x,
    weight,
    second,
    weight_start,
    bias,
    y,
    partial,
    arrived,
    T,
    N,
    K,
    x_stride,
    y_stride,
    BT: tl.constexpr,
    BN: tl.constexpr,
    SECOND: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    TMA: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[T, N] = x[T, K] @ weight[N, K].T + bias[N]``.

    The grid is one axis of tiles(N) * SPLIT * tiles(T) blocks, tokens fastest: blocks that read the same
    weights run together.

    Args:
        x, weight: TMA descriptors with blocks ``[BT, BK]`` and ``[BN, BK]`` where ``TMA``, else pointers.
        second: descriptor over the weights with blocks ``[SECOND, BK]``; None where SECOND is 0.
        weight_start: pointer to the weights.
        bias: pointer or None.
        partial: fp32 scratch, ``[tiles, SPLIT, BT, BN]``; None where SPLIT is 1.
        arrived: int32 zeros, ``[tiles]``, zeros again at the end; None where SPLIT is 1.
        x_stride, y_stride: elements from one row to the next.
        SECOND: further outputs of the block, in a second accumulator; 0 without ``TMA`` or where SPLIT is not 1.
        AHEAD: bytes of each weight row to bring to L2 while the kernel before still runs.
        WIDEN: multiply in fp32 (operands of fp32, or of different dtypes).
        PDL: this launch may start before the one ahead of it ends.
    """
    tiles_t = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    tile_t = pid % tiles_t
    split = (pid // tiles_t) % SPLIT
    tile_n = pid // (tiles_t * SPLIT)
    t0 = tile_t * BT
    n0 = tile_n * (BN + SECOND)
    s0 = n0 + BN
    t = t0 + tl.arange(0, BT)
    n = n0 + tl.arange(0, BN)
    span = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    begin = split * span
    end = tl.minimum(K, begin + span)

    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            # A range past K is empty and prefetches nothing.
            nbytes = tl.minimum((end - begin) * 2, AHEAD)
            if nbytes > 0:
                prefetch_rows(weight_start, n, N, K, begin, nbytes)
                if SECOND > 0:
                    prefetch_rows(weight_start, s0 + tl.arange(0, SECOND), N, K, begin, nbytes)
    bias_N = None
    bias_S = None
    if bias is not None:
        bias_N = _bias(bias, n, N)
        if SECOND > 0:
            bias_S = _bias(bias, s0 + tl.arange(0, SECOND), N)
    if PDL:
        gdc_wait()

    if not TMA:
        k_of = tl.arange(0, BK)
        x_rows = x + t.to(tl.int64)[:, None] * x_stride
        w_rows = weight + n.to(tl.int64)[:, None] * K
    acc_NT = tl.zeros((BN, BT), tl.float32)
    if SECOND > 0:
        acc_ST = tl.zeros((SECOND, BT), tl.float32)
    for k in tl.range(begin, end, BK):
        if TMA:
            w_NK = weight.load([n0, k])
            x_TK = x.load([t0, k])
        else:
            inside = (k + k_of)[None, :] < end
            w_NK = tl.load(w_rows + (k + k_of)[None, :], mask=(n < N)[:, None] & inside, other=0.0)
            x_TK = tl.load(x_rows + (k + k_of)[None, :], mask=(t < T)[:, None] & inside, other=0.0)
        if WIDEN:
            w_NK = w_NK.to(tl.float32)
            x_TK = x_TK.to(tl.float32)
        acc_NT = tl.dot(w_NK, x_TK.T, acc_NT, input_precision="ieee")
        if SECOND > 0:
            w_SK = second.load([s0, k])
            acc_ST = tl.dot(w_SK, x_TK.T, acc_ST, input_precision="ieee")

    if SPLIT == 1:
        _store(y, acc_NT.T, bias_N, t, n, T, N, y_stride)
        if SECOND > 0:
            _store(y, acc_ST.T, bias_S, t, s0 + tl.arange(0, SECOND), T, N, y_stride)
    else:
        tile = tile_n * tiles_t + tile_t
        sums = partial + tile.to(tl.int64) * (SPLIT * BT * BN)
        i, j = tl.arange(0, BT), tl.arange(0, BN)
        tl.store(
            sums + split * (BT * BN) + i[:, None] * BN + j[None, :],
            acc_NT.T,
            mask=(t < T)[:, None] & (n < N)[None, :],
            cache_modifier=".cg",
        )
        # All stores of this block come before its arrival; one thread's release covers them after a barrier.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        if before == SPLIT - 1:
            # 64 rows at a time: 256 at once need more registers than there are.
            ROWS: tl.constexpr = BT if BT < 64 else 64
            for start in range(0, tl.minimum(T - t0, BT), ROWS):
                r = start + tl.arange(0, ROWS)
                valid = (t0 + r < T)[:, None] & (n < N)[None, :]
                cells = sums + r[:, None] * BN + j[None, :]
                sum_TN = tl.zeros((ROWS, BN), tl.float32)
                for s in tl.static_range(SPLIT):
                    sum_TN += tl.load(cells + s * (BT * BN), mask=valid, other=0.0, cache_modifier=".cg")
                _store(y, sum_TN, bias_N, t0 + r, n, T, N, y_stride)
            tl.store(arrived + tile, 0)
