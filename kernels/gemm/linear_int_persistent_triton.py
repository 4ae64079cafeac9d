"""Projection with packed weights (integers, 4-bit floats) for many rows: blocks walk over tiles, fed by TMA.

Words are widened and scaled in registers, once for ``BT`` tokens, and are the left side of the product, of which
seven instructions may be under way while the next words are widened. Tiles go in groups of ``TILES`` along the tokens
before they move on along the outputs, as in linear_persistent_triton.py.

# T tokens, N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.gemm.int_values_triton import centred, scaled
from makeready.kernels.gemm.linear_persistent_triton import tile_of_outputs, tile_of_tokens
from makeready.kernels.mx_values_triton import mx_values


@triton.jit
def linear_int_persistent(
    x,
    weight,
    weight_scale,
    weight_zero,
    weight_global_scale,
    bias,
    y,
    T,
    N,
    K,
    MX: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[T, N] = x[T, K] @ ((weight[N, K] - zero) * scale).T + bias[N]``.

    Args:
        x, weight, y: TMA descriptors with blocks ``[BT, 128]``, ``[BN, 8 * BITS]`` and ``[BT, BN]``.
        weight_scale, weight_zero: pointers to tiles of fp16 and uint8; zeros None where weights are symmetric, fp16
            where they are offsets.
        weight_global_scale, bias: pointers or None; the first to one fp32 an output.
        MX: weights are e2m1 and scales e8m0 or pairs of e4m3, of 32 inputs each; BITS is 4, GROUP 32.
        GROUP: inputs that share a scale: 16, 32, 64, a multiple of 128, or what is at least K.
        TILES: of tokens that are gone through before the next outputs.
        PDL: this launch may start before the one ahead of it ends.
    """
    COUNT: tl.constexpr = 8 * BITS
    tiles_t = tl.cdiv(T, BT)
    tiles_n = tl.cdiv(N, BN)
    steps = tl.cdiv(K, 128)
    groups = tl.cdiv(K, GROUP)
    a_group = TILES * tiles_n
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0)):
        t0 = tile_of_tokens(tile, a_group, tiles_t, TILES) * BT
        n0 = tile_of_outputs(tile, a_group, tiles_t, TILES) * BN
        n = tl.minimum(n0 + tl.arange(0, BN), N - 1)
        acc_NT = tl.zeros((BN, BT), tl.float32)
        for step in range(steps):
            w, k = weight.load([n0, step * COUNT]), step * 128
            if MX:
                w_NK = mx_values(w, weight_scale, n, k, groups, x.dtype)
            else:
                w_NK = centred(w, weight_zero, n, k, groups, BITS, GROUP, x.dtype)
                w_NK = scaled(w_NK, weight_scale, weight_zero, n, k, groups, GROUP, x.dtype)
            acc_NT = tl.dot(w_NK, x.load([t0, k]).T, acc_NT)
        if weight_global_scale is not None:
            acc_NT *= tl.load(weight_global_scale + n)[:, None]
        if bias is not None:
            acc_NT += tl.load(bias + n).to(tl.float32)[:, None]
        y.store([t0, n0], acc_NT.T.to(y.dtype))
