"""Projection of 8-bit floats for many rows, with scales for every 128 of K: fed and drained by TMA.

Sums over 128 of K leave the matrix unit, are scaled and added to fp32 registers, as DeepSeek-V3 does
(arXiv:2412.19437): the scales ask for it, and the matrix unit's own sums lose bits over long K. Triton waits
for every such product, so the unit is idle while a block scales and adds. Two blocks of a multiprocessor
fill each other's gaps; for both to fit, a tile is up to three pieces side by side, whose sums leave the unit
one piece at a time (115 registers a thread for tiles of 128 x 128 in two pieces, 166 in one).

# T tokens, N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _now(x):
    """``x``, made before what follows: the compiler would rather add up all pieces at the end of a step, and
    keep the matrix unit's sums of all of them in registers until then.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def linear_fp8_block_persistent(
    x,
    weight,
    x_scale,
    weight_scale,
    bias,
    y,
    T,
    N,
    K,
    BT: tl.constexpr,
    BN: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[T, N] = x[T, K] @ weight[N, K].T``, both scaled by group, ``+ bias[N]``.

    Args:
        x, weight, y: TMA descriptors with blocks ``[BT, 128]``, ``[BN, 128]`` and ``[BT, BN]``.
        x_scale: pointer to fp32 ``[T, K / 128]``.
        weight_scale: pointer to fp32 ``[N / 128, K / 128]``, the first rounded up; ``BN`` divides 128.
        bias: pointer or None.
        PIECES: of ``[BT, BN]`` in a tile, 1 to 3.
        GROUP: tiles along the tokens that go before the next outputs, so that a wave's operands stay in L2.
        FLATTEN: copies of a tile begin before the last one is written. Takes some 50 registers a thread more:
            for launches that have a multiprocessor's second block to fill the gap, it is not worth them.
        PDL: this launch may start before the one ahead of it ends.
    """
    tiles_t = tl.cdiv(T, BT)
    tiles_n = tl.cdiv(N, PIECES * BN)
    steps = K // 128
    last = (N - 1) // 128
    a_group = GROUP * tiles_n
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        first = tile // a_group * GROUP
        rows = tl.minimum(tiles_t - first, GROUP)
        t0 = (first + tile % a_group % rows) * BT
        n0 = tile % a_group // rows * (PIECES * BN)
        # Beyond T and N the last scales are read; what they scale is not stored.
        row = tl.minimum(t0 + tl.arange(0, BT), T - 1) * steps
        square0 = n0 // 128 * steps
        square1 = tl.minimum((n0 + BN) // 128, last) * steps
        square2 = tl.minimum((n0 + 2 * BN) // 128, last) * steps
        acc0_TN = tl.zeros((BT, BN), tl.float32)
        acc1_TN = tl.zeros((BT, BN), tl.float32)
        acc2_TN = tl.zeros((BT, BN), tl.float32)
        for step in range(steps):
            # All scales before the first product: what waits for a product is not moved ahead of it, and the
            # way to L2 and back would then come on top of every step.
            scale_T = tl.load(x_scale + (row + step))
            scale0_T = scale_T * tl.load(weight_scale + (square0 + step))
            if PIECES > 1:
                scale1_T = scale_T * tl.load(weight_scale + (square1 + step))
            if PIECES > 2:
                scale2_T = scale_T * tl.load(weight_scale + (square2 + step))
            x_TK = x.load([t0, step * 128])
            w0_NK = weight.load([n0, step * 128])
            acc0_TN += tl.dot(x_TK, w0_NK.T) * scale0_T[:, None]
            if PIECES > 1:
                acc0_TN = _now(acc0_TN)
                w1_NK = weight.load([n0 + BN, step * 128])
                acc1_TN += tl.dot(x_TK, w1_NK.T) * scale1_T[:, None]
            if PIECES > 2:
                acc1_TN = _now(acc1_TN)
                w2_NK = weight.load([n0 + 2 * BN, step * 128])
                acc2_TN += tl.dot(x_TK, w2_NK.T) * scale2_T[:, None]
        _drain(acc0_TN, bias, y, t0, n0, N, BN)
        if PIECES > 1:
            _drain(acc1_TN, bias, y, t0, n0 + BN, N, BN)
        if PIECES > 2:
            _drain(acc2_TN, bias, y, t0, n0 + 2 * BN, N, BN)


@triton.jit
def _drain(acc_TN, bias, y, t0, n0, N, BN: tl.constexpr):
    """Write a finished piece."""
    if bias is not None:
        n = n0 + tl.arange(0, BN)
        acc_TN += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y.store([t0, n0], acc_TN.to(y.dtype))
