"""Products of tokens with their experts' weights in Triton: any sizes and dtypes, tiles found on the device.

A block takes tiles ``program, program + grid, ...`` of all experts' tiles in a row, so that one grid serves every
routing. Weights are the left side of the product, as in linear_stream_triton.py: few tokens waste nothing.

# M entries, E experts, N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.elementwise_triton import clamped_swiglu_of

SQUARE = tl.constexpr(128)  # side of a square of weights that shares a scale


@triton.jit
def find_tile(tile, begin, end, tiles_n, E: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr):
    """Expert, first entry, entry behind its last and column of ``tile``; entries go before columns.

    Args:
        begin, end: ``[EP]``, of the experts' entries; equal from E on.
    """
    e = tl.arange(0, EP)
    tiles_t = tl.cdiv(end - begin, BT)
    after = tl.cumsum(tiles_t * tiles_n, 0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    own = e == expert
    mine = tl.sum(tl.where(own, tiles_t, 0), 0)
    local = tile - tl.sum(tl.where(own, after - tiles_t * tiles_n, 0), 0)
    first = tl.sum(tl.where(own, begin, 0), 0) + local % mine * BT
    return expert, first, tl.sum(tl.where(own, end, 0), 0), local // mine


@triton.jit
def scaled(acc_NT, of_row, weight_scale, n, N):
    """Sums by the scales of rows and of outputs, where scales are by channel."""
    return acc_NT.to(tl.float32) * of_row[None, :] * tl.load(weight_scale + n, mask=n < N, other=0.0)[:, None]


@triton.jit
def with_bias(acc_NT, bias, n, N):
    """Sums and what their outputs ``n`` have in ``bias``, of one expert; None: as they are."""
    if bias is not None:
        acc_NT += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return acc_NT


@triton.jit
def gated(
    gate_NT, up_NT, GATE: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """What the op ``GATE`` makes of both in fp32, after they are rounded to ``KIND``."""
    gate_NT = gate_NT.to(KIND).to(tl.float32)
    up_NT = up_NT.to(KIND).to(tl.float32)
    if GATE == "silu_mul":
        made = gate_NT * tl.sigmoid(gate_NT) * up_NT
    else:
        made = clamped_swiglu_of(gate_NT, up_NT, ALPHA, LIMIT)
    return made


@triton.jit
def multiply(
    acc_NT, w_rows, x_TK, n, k, of, square, of_row, N, K, step,
    WIDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``acc_NT`` and the products of one step of K; in fp32 where ``WIDEN``, scaled where ``BLOCK``."""
    w_NK = tl.load(w_rows + of, mask=(n < N)[:, None] & (of < K), other=0.0)
    if WIDEN:
        w_NK = w_NK.to(tl.float32)
    if BLOCK:
        of_output = tl.load(square + step, mask=n < N, other=0.0)
        return acc_NT + tl.dot(w_NK, x_TK.T) * of_row[None, :] * of_output[:, None]
    # Hopper adds products of 8-bit floats up in 14 bits: at 14,336 inputs sums were off by a tenth.
    EXACT: tl.constexpr = w_NK.shape[1] if w_NK.dtype == tl.float8e4nv else None
    return tl.dot(
        w_NK, x_TK.T, acc_NT, input_precision="ieee", max_num_imprecise_acc=EXACT, out_dtype=acc_NT.dtype
    )


@triton.jit
def grouped_tiles(
    x,
    x_scale,
    weight,
    weight_scale,
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
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDEN: tl.constexpr,
    SCALES: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[j] = x[row of j] @ weight[expert of j].T + bias[expert of j]``; zeros for entries behind the last expert's.

    Args:
        x_scale, weight_scale: fp32, of rows and of (expert, output) where ``SCALES`` is "channel"; where it is
            "block" of rows and groups of 128 inputs, and of squares of 128, and ``BK`` is 128; else None.
        order: None where ``TOP_K`` is 0 and rows of x are the entries.
        bias: of every expert's outputs, or None.
        N: columns of y; experts have as many outputs, or twice as many where there is a gate.
        EP: E rounded up to a power of two.
        GATE: the op that y is of the first N outputs and the others, both rounded to its dtype before; None for none.
        ALPHA, LIMIT: of clamped SwiGLU.
        WIDEN: multiply in fp32 (operands of fp32, or of different dtypes).
        PDL: this launch may start before the one ahead of it ends.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    CHANNEL: tl.constexpr = SCALES == "channel"
    BLOCK: tl.constexpr = SCALES == "block"
    GATED: tl.constexpr = GATE is not None
    HALVES: tl.constexpr = 2 if GATED else 1
    SUM: tl.constexpr = tl.int32 if weight.dtype.element_ty == tl.int8 else tl.float32
    e = tl.arange(0, EP)
    begin = tl.load(start + tl.minimum(e, E))
    end = tl.load(start + tl.minimum(e + 1, E))
    tiles_n = tl.cdiv(N, BN)
    total = tl.sum(tl.cdiv(end - begin, BT), 0) * tiles_n
    of_t, of_n, of_k = tl.arange(0, BT), tl.arange(0, BN), tl.arange(0, BK)
    kind = y.dtype.element_ty
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, stop, column = find_tile(tile, begin, end, tiles_n, E, EP, BT)
        j, n = first + of_t, column * BN + of_n
        inside = j < stop
        row = tl.load(order + j, mask=inside, other=0) // TOP_K if TOP_K > 0 else j
        x_rows = x + row.to(tl.int64)[:, None] * x_stride
        w_rows = weight + expert.to(tl.int64) * (HALVES * N) * K + n.to(tl.int64)[:, None] * K
        w_up = w_rows + N.to(tl.int64) * K
        groups = K // SQUARE
        square = weight_scale
        square_up = weight_scale
        if BLOCK:
            squares = expert * tl.cdiv(HALVES * N, SQUARE)
            square += (squares + n // SQUARE) * groups
            square_up += (squares + (N + n) // SQUARE) * groups
        acc_NT = tl.zeros((BN, BT), SUM)
        up_NT = tl.zeros((BN, BT), SUM)
        for k in tl.range(0, K, BK):
            of, step = (k + of_k)[None, :], k // SQUARE
            x_TK = tl.load(x_rows + of, mask=inside[:, None] & (of < K), other=0.0)
            if WIDEN:
                x_TK = x_TK.to(tl.float32)
            of_row = of_t
            if BLOCK:
                of_row = tl.load(x_scale + row * groups + step, mask=inside, other=0.0)
            acc_NT = multiply(acc_NT, w_rows, x_TK, n, k, of, square, of_row, N, K, step, WIDEN, BLOCK)
            if GATED:
                up_NT = multiply(up_NT, w_up, x_TK, n, k, of, square_up, of_row, N, K, step, WIDEN, BLOCK)
        if CHANNEL:
            of_row = tl.load(x_scale + row, mask=inside, other=0.0)
            own = weight_scale + expert * (HALVES * N)
            acc_NT = scaled(acc_NT, of_row, own, n, N)
            if GATED:
                up_NT = scaled(up_NT, of_row, own + N, n, N)
        of_expert = bias
        if bias is not None:
            of_expert += expert * (HALVES * N)
            acc_NT = with_bias(acc_NT, of_expert, n, N)
        if GATED:
            if bias is not None:
                up_NT = with_bias(up_NT, of_expert + N, n, N)
            acc_NT = gated(acc_NT, up_NT, GATE, ALPHA, LIMIT, kind)
        out = y + j.to(tl.int64)[:, None] * y_stride + n[None, :]
        tl.store(out, acc_NT.T.to(kind), mask=inside[:, None] & (n < N)[None, :])

    last = tl.load(start + E)
    for tile in range(tl.program_id(0), tl.cdiv(M - last, BT) * tiles_n, tl.num_programs(0)):
        j, n = last + tile // tiles_n * BT + of_t, tile % tiles_n * BN + of_n
        out = y + j.to(tl.int64)[:, None] * y_stride + n[None, :]
        tl.store(out, tl.zeros((BT, BN), kind), mask=(j < M)[:, None] & (n < N)[None, :])
