"""Dense projection for many rows: one block a multiprocessor walks over output tiles, fed by TMA.

With one accumulator the loops over tiles and over K are flattened into one, so the copies for the next tile
are under way while the last one is being written. Tiles go in groups of ``GROUP`` along the tokens before
they move on along the outputs: a wave then touches few different rows of either operand, which stay in L2. A
second accumulator makes tiles of 192 outputs (see linear_stream_triton.py).

# T tokens, N outputs, K inputs, S rows of the weights in the second accumulator
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.gemm.linear_stream_triton import prefetch_rows


@triton.jit
def _store(y, acc_TN, bias, t0, n0, N, BT: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """Write a tile in ``PARTS`` copies, through as small a part of the shared memory."""
    if bias is not None:
        n = n0 + tl.arange(0, BN)
        acc_TN += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if PARTS == 1:
        y.store([t0, n0], acc_TN.to(y.dtype))
    else:
        pair = tl.permute(tl.reshape(acc_TN, (BT, 2, BN // 2)), (0, 2, 1))
        left_TN, right_TN = tl.split(pair)
        _store(y, left_TN, None, t0, n0, N, BT, BN // 2, PARTS // 2)
        _store(y, right_TN, None, t0, n0 + BN // 2, N, BT, BN // 2, PARTS // 2)


@triton.jit
def linear_persistent(
    x,
    weight,
    second,
    weight_start,
    bias,
    y,
    T,
    N,
    K,
    BT: tl.constexpr,
    BN: tl.constexpr,
    SECOND: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[T, N] = x[T, K] @ weight[N, K].T + bias[N]``.

    Args:
        x, weight, y: TMA descriptors with blocks ``[BT, BK]``, ``[BN, BK]`` and ``[BT, BN // PARTS]``.
        second: descriptor over the weights with blocks ``[SECOND, BK]``; None where SECOND is 0.
        weight_start: pointer to the weights.
        bias: pointer or None.
        SECOND: further outputs of the tile, in a second accumulator: BN // PARTS or none.
        PARTS: copies in which the first BN outputs of a tile are written: a power of two.
        AHEAD: bytes of the first tile's weight rows to bring to L2 while the kernel before still runs.
        PDL: this launch may start before the one ahead of it ends.
    """
    OUT: tl.constexpr = BN + SECOND
    tiles_t = tl.cdiv(T, BT)
    tiles_n = tl.cdiv(N, OUT)
    steps = tl.cdiv(K, BK)
    a_group = GROUP * tiles_n
    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            n = tile_of_outputs(tl.program_id(0), a_group, tiles_t, GROUP) * OUT + tl.arange(0, BN)
            prefetch_rows(weight_start, n, N, K, 0, tl.minimum(2 * K, AHEAD))
        gdc_wait()
    # In a flattened loop with two accumulators the assembler waits for each matrix instruction: 56 µs for 37.
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0), flatten=SECOND == 0):
        t0 = tile_of_tokens(tile, a_group, tiles_t, GROUP) * BT
        n0 = tile_of_outputs(tile, a_group, tiles_t, GROUP) * OUT
        acc_TN = tl.zeros((BT, BN), tl.float32)
        if SECOND > 0:
            acc_TS = tl.zeros((BT, SECOND), tl.float32)
        for step in range(steps):
            x_TK = x.load([t0, step * BK])
            w_NK = weight.load([n0, step * BK])
            acc_TN = tl.dot(x_TK, w_NK.T, acc_TN)
            if SECOND > 0:
                w_SK = second.load([n0 + BN, step * BK])
                acc_TS = tl.dot(x_TK, w_SK.T, acc_TS)
        _store(y, acc_TN, bias, t0, n0, N, BT, BN, PARTS)
        if SECOND > 0:
            _store(y, acc_TS, bias, t0, n0 + BN, N, BT, SECOND, 1)


@triton.jit
def tile_of_tokens(tile, a_group, tiles_t, GROUP: tl.constexpr):
    """Which tile along the tokens the ``tile``-th is."""
    first = tile // a_group * GROUP
    return first + tile % a_group % tl.minimum(tiles_t - first, GROUP)


@triton.jit
def tile_of_outputs(tile, a_group, tiles_t, GROUP: tl.constexpr):
    """Which tile along the outputs the ``tile``-th is."""
    first = tile // a_group * GROUP
    return tile % a_group // tl.minimum(tiles_t - first, GROUP)
