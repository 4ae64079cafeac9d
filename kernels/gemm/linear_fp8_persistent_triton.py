"""Projection of 8-bit floats or integers for many rows, one scale a token and one an output.

Fed and drained by TMA. As ``linear_persistent``, with the scales where a tile is written. The matrix unit adds up all
of K. Sums of integers are exact; those of 8-bit floats keep about 13 fraction bits (Zhao et al. 2025,
arXiv:2505.09343): by a model of that, 0.1 % of a result is lost for K = 4096 and 0.3 % for K = 12288, where rounding
operands to 8 bits costs ten times as much. Adding up in registers would cost a quarter of the rate.

# T tokens, N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _scaled(acc_TN, x_scale_T, weight_scale, bias, n, N):
    """Sums of outputs ``n`` as they leave the kernel."""
    weight_scale_N = tl.load(weight_scale + n, mask=n < N, other=0.0)
    acc_TN = acc_TN.to(tl.float32) * x_scale_T[:, None] * weight_scale_N[None, :]
    if bias is not None:
        acc_TN += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc_TN


@triton.jit
def linear_fp8_persistent(
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
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[T, N] = (x[T, K] @ weight[N, K].T) * x_scale[T] * weight_scale[N] + bias[N]``.

    Args:
        x, weight, y: TMA descriptors with blocks ``[BT, BK]``, ``[BN, BK]`` and ``[BT, BN // HALVES]``.
        x_scale, weight_scale: pointers to fp32.
        bias: pointer or None.
        GROUP: tiles along the tokens that go before the next outputs, so that a wave's operands stay in L2.
        HALVES: 1, or 2 to write ``BN`` outputs in two copies through half the shared memory.
        PDL: this launch may start before the one ahead of it ends.
    """
    tiles_t = tl.cdiv(T, BT)
    tiles_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    SUM: tl.constexpr = tl.int32 if weight.dtype == tl.int8 else tl.float32
    a_group = GROUP * tiles_n
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0), flatten=True):
        first = tile // a_group * GROUP
        rows = tl.minimum(tiles_t - first, GROUP)
        t0 = (first + tile % a_group % rows) * BT
        n0 = tile % a_group // rows * BN
        acc_TN = tl.zeros((BT, BN), SUM)
        for step in range(steps):
            x_TK = x.load([t0, step * BK])
            w_NK = weight.load([n0, step * BK])
            acc_TN = tl.dot(x_TK, w_NK.T, acc_TN, out_dtype=SUM)
        t, n = t0 + tl.arange(0, BT), n0 + tl.arange(0, BN)
        x_scale_T = tl.load(x_scale + t, mask=t < T, other=0.0)
        acc_TN = _scaled(acc_TN, x_scale_T, weight_scale, bias, n, N)
        if HALVES == 2:
            pair = tl.permute(tl.reshape(acc_TN, (BT, 2, BN // 2)), (0, 2, 1))
            left_TN, right_TN = tl.split(pair)
            y.store([t0, n0], left_TN.to(y.dtype))
            y.store([t0, n0 + BN // 2], right_TN.to(y.dtype))
        else:
            y.store([t0, n0], acc_TN.to(y.dtype))
