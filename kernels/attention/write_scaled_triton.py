"""Writing keys and values with scales on the GPU: what a block does to its heads; the op without norm and rotation.

Features of a head come as two halves and a rest, as rotation leaves them (qkv_triton.py).

# M heads of tokens, I features of a half, J of the rest
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.scaled import kv_write_scaled
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel


@triton.jit
def store_heads(
    cache, scales, head_M, valid_M, x_1, x_2, x_3, VALUE: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Store heads at ``head_M`` (slot * KV heads + head) with their scales; see :func:`~.scaled.quantize_heads`.

    Args:
        x_1, x_2: fp32 ``[M, HALF]``, the first ``ROTARY`` features, zeros behind them.
        x_3: fp32 ``[M, REST]``, the features behind those.
        VALUE: whether these are values.
    """
    i = tl.arange(0, HALF)
    j = tl.arange(0, REST)
    half = valid_M[:, None] & (i < ROTARY // 2)[None, :]
    rest = valid_M[:, None] & (j < HEAD_DIM - ROTARY)[None, :]
    # Maxima pass over NaN; a sum of zeros times what is not finite does not.
    none_M = tl.sum(x_1 * 0.0 + x_2 * 0.0, 1)
    if HEAD_DIM > ROTARY:
        none_M += tl.sum(x_3 * 0.0, 1)
    if BITS == 4:
        least_M, most_M = _range(x_1, x_2, half)
        if HEAD_DIM > ROTARY:
            least_3, most_3 = _range(x_3, x_3, rest)
            least_M = tl.minimum(least_M, least_3)
            most_M = tl.maximum(most_M, most_3)
        scale_M = (tl.div_rn(most_M - least_M, 15.0) + none_M).to(tl.float16)
        offset_M = (least_M + 8.0 * scale_M.to(tl.float32)).to(tl.float16)
        good_M = finite(scale_M) & finite(offset_M)
        tl.store(scales + head_M * 4 + VALUE * 2, or_nan(scale_M, good_M), mask=valid_M)
        tl.store(scales + head_M * 4 + VALUE * 2 + 1, or_nan(offset_M, good_M), mask=valid_M)
        good_M &= scale_M.to(tl.float32) > 0
        offset_M = offset_M.to(tl.float32)
    else:
        most_M = tl.maximum(tl.max(tl.abs(x_1), 1), tl.max(tl.abs(x_2), 1))
        if HEAD_DIM > ROTARY:
            most_M = tl.maximum(most_M, tl.max(tl.abs(x_3), 1))
        largest = 448.0 if cache.dtype.element_ty.is_fp8() else 127.0
        scale_M = (tl.div_rn(most_M, largest) + none_M).to(tl.float16)
        good_M = finite(scale_M)
        tl.store(scales + head_M * 2 + VALUE, or_nan(scale_M, good_M), mask=valid_M)
        good_M &= scale_M.to(tl.float32) > 0
        offset_M = none_M * 0.0
    scale_M = tl.where(good_M, scale_M.to(tl.float32), 1.0)
    to = cache + (head_M * (HEAD_DIM * BITS // 8))[:, None]
    _store_part(to, x_1, scale_M, offset_M, good_M, valid_M, 0, ROTARY // 2, HALF, BITS)
    _store_part(to, x_2, scale_M, offset_M, good_M, valid_M, ROTARY // 2, ROTARY // 2, HALF, BITS)
    if HEAD_DIM > ROTARY:
        _store_part(to, x_3, scale_M, offset_M, good_M, valid_M, ROTARY, HEAD_DIM - ROTARY, REST, BITS)


@triton.jit
def finite(x):
    x = x.to(tl.float32)
    return x - x == 0.0


@triton.jit
def or_nan(x, good):
    return tl.where(good, x.to(tl.float32), float("nan")).to(tl.float16)


@triton.jit
def _range(x, y, there):
    """The least and largest of each row's numbers."""
    least_M = tl.min(tl.where(there, tl.minimum(x, y), float("inf")), 1)
    most_M = tl.max(tl.where(there, tl.maximum(x, y), float("-inf")), 1)
    return least_M, most_M


@triton.jit
def _store_part(
    to, x, scale_M, offset_M, good_M, valid_M, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Store features ``FIRST : FIRST + COUNT`` of heads ``to``, of ``x[M, WIDTH]``."""
    M: tl.constexpr = x.shape[0]
    steps = tl.where(good_M[:, None], tl.div_rn(x - offset_M[:, None], scale_M[:, None]), 0.0)
    if BITS == 4:
        codes = tl.clamp(whole(steps) + 8.0, 0.0, 15.0).to(tl.uint8)
        low, high = tl.split(codes.reshape(M, WIDTH // 2, 2))
        b = tl.arange(0, WIDTH // 2)
        there = valid_M[:, None] & (b < COUNT // 2)[None, :]
        tl.store(to + FIRST // 2 + b[None, :], low | (high << 4), mask=there)
    else:
        i = tl.arange(0, WIDTH)
        there = valid_M[:, None] & (i < COUNT)[None, :]
        kind = to.dtype.element_ty
        if kind.is_fp8():
            numbers = tl.clamp(steps, -448.0, 448.0).to(kind)
        else:
            numbers = tl.clamp(whole(steps), -127.0, 127.0).to(tl.int8)
        tl.store(to + FIRST + i[None, :], numbers, mask=there)


@triton.jit
def whole(x):
    """To nearest, ties to even, of magnitudes below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def kv_write_scaled_rows(
    k,
    v,
    kv_slot,
    k_cache,
    v_cache,
    scales,
    tokens,
    k_stride,
    v_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    M: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tokens' heads to their slots; the grid is groups of M heads × keys and values."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    PAIRED: tl.constexpr = HEAD_DIM // 4 * 4
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    token_M = row_M // KV_HEADS
    valid_M = token_M < tokens
    head_M = tl.load(kv_slot + token_M, mask=valid_M, other=0).to(tl.int64) * KV_HEADS + row_M % KV_HEADS
    token_M = token_M.to(tl.int64)
    feature_M = row_M % KV_HEADS * HEAD_DIM
    if tl.program_id(1) == 0:
        x_1, x_2, x_3 = _load(k + token_M * k_stride + feature_M, valid_M, HEAD_DIM, PAIRED, M, HALF, REST)
        store_heads(k_cache, scales, head_M, valid_M, x_1, x_2, x_3, 0, HEAD_DIM, PAIRED, HALF, REST, BITS)
    else:
        x_1, x_2, x_3 = _load(v + token_M * v_stride + feature_M, valid_M, HEAD_DIM, PAIRED, M, HALF, REST)
        store_heads(v_cache, scales, head_M, valid_M, x_1, x_2, x_3, 1, HEAD_DIM, PAIRED, HALF, REST, BITS)


@triton.jit
def _load(
    x_M, valid_M, HEAD_DIM: tl.constexpr, PAIRED: tl.constexpr, M: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Two halves of the first ``PAIRED`` features, and the others."""
    i = tl.arange(0, HALF)
    half = valid_M[:, None] & (i < PAIRED // 2)[None, :]
    x_1 = tl.load(x_M[:, None] + i[None, :], mask=half, other=0.0).to(tl.float32)
    x_2 = tl.load(x_M[:, None] + PAIRED // 2 + i[None, :], mask=half, other=0.0).to(tl.float32)
    x_3 = tl.zeros((M, REST), tl.float32)
    if HEAD_DIM > PAIRED:
        j = tl.arange(0, REST)
        rest = valid_M[:, None] & (j < HEAD_DIM - PAIRED)[None, :]
        x_3 = tl.load(x_M[:, None] + PAIRED + j[None, :], mask=rest, other=0.0).to(tl.float32)
    return x_1, x_2, x_3


@cuda_kernel(kv_write_scaled, "rows", invariant=True)
def kv_write_scaled_cuda(call: OpCall) -> Sequence[Candidate]:
    """One way; the fused op takes its place in plans that are meant to be fast."""
    kv_heads, head_dim, tokens = call.attrs["kv_heads"], call.attrs["head_dim"], call.dims["T"]
    dependent = "pdl" in call.features
    M = max(1, 2048 // triton.next_power_of_2(head_dim))
    launch = DeviceLaunch(
        function=f"{__name__}:kv_write_scaled_rows",
        constants={
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "BITS": call.attrs["bits"],
            "M": M,
            "HALF": triton.next_power_of_2(max(2, head_dim // 4 * 2)),
            "REST": triton.next_power_of_2(max(2, head_dim % 4)),
            "PDL": dependent,
        },
        arguments={
            **{name: Pointer(name) for name in ("k", "v", "kv_slot", "k_cache", "v_cache", "scales")},
            "tokens": Scalar(tokens, "int32", specialize=False),
            "k_stride": Scalar(call.tensors["k"].row_stride, "int32"),
            "v_stride": Scalar(call.tensors["v"].row_stride, "int32"),
        },
        grid=(triton.cdiv(tokens * kv_heads, M), 2, 1),
        dependent=dependent,
    )
    return [Candidate("rows", (launch,))]
