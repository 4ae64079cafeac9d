"""Rotary position embedding on GPUs, where it is not fused into another kernel.

# T tokens, D head dim, Q rotary features of a head
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.embedding_triton import gather_launch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.rope import rope, rope_rows, rope_rows_dynamic, rope_rows_logn, rope_rows_stepped
from makeready.kernels.row_tiles import power_of_two, row_tiles

_PLACES = ("positions", "token_slot", "prompt_len", "rows")


@triton.jit
def rotate_heads(
    x,
    rows,
    y,
    count,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotate ``ROWS`` of ``count`` heads a block; WIDTH and REST are Q / 2 and D - Q in powers of two."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, column = (row // HEADS).to(tl.int64), (row % HEADS) * D
    from_, to = x + token * X_STRIDE + column, y + token * Y_STRIDE + column
    c = tl.arange(0, WIDTH)[None, :]
    inside = (row < count) & (c < Q // 2)
    cos = tl.load(rows + token * Q_STRIDE + c, mask=inside, other=0.0)
    sin = tl.load(rows + token * Q_STRIDE + (Q // 2 + c), mask=inside, other=0.0)
    first = tl.load(from_ + c, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(from_ + (Q // 2 + c), mask=inside, other=0.0).to(tl.float32)
    tl.store(to + c, (first * cos - second * sin).to(y.dtype.element_ty), mask=inside)
    tl.store(to + (Q // 2 + c), (second * cos + first * sin).to(y.dtype.element_ty), mask=inside)
    if Q < D:
        c = tl.arange(0, REST)[None, :]
        inside = (row < count) & (c < D - Q)
        tl.store(to + (Q + c), tl.load(from_ + (Q + c), mask=inside), mask=inside)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of fp32 angles up to 10⁶, to fp32: reduced in fp64, then Taylor's series.

    The device library's own need local memory for angles this large.
    """
    wide = angle.to(tl.float64)
    quarter = tl.floor(wide * 0.6366197723675814 + 0.5)  # 2 / pi
    r = (wide - quarter * 1.5707963267948966).to(tl.float32)
    rr = r * r
    sin = r + r * rr * (-1 / 6 + rr * (1 / 120 + rr * (-1 / 5040 + rr * (1 / 362880))))
    cos = 1 + rr * (-1 / 2 + rr * (1 / 24 + rr * (-1 / 720 + rr * (1 / 40320 - rr * (1 / 3628800)))))
    quarter = quarter.to(tl.int32)
    odd, cos_below, sin_below = (quarter & 1) != 0, ((quarter + 1) & 2) != 0, (quarter & 2) != 0
    turned_cos, turned_sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(cos_below, -turned_cos, turned_cos), tl.where(sin_below, -turned_sin, turned_sin)


@triton.jit
def _store_rows(
    rows,
    position,
    base,
    t,
    c,
    tokens,
    Q: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rotary rows of tokens ``t`` at ``position``, whose fp32 ``base`` differs from token to token."""
    exponent = tl.div_rn(2.0 * c.to(tl.float32), tl.full((1, WIDTH), Q, tl.float32))
    period = tl.exp2(tl.log2(base.to(tl.float64)) * exponent.to(tl.float64)).to(tl.float32)
    angle = position.to(tl.float32) * tl.div_rn(tl.full((ROWS, WIDTH), 1.0, tl.float32), period)
    inside = (t < tokens) & (c < Q // 2)
    to = rows + t.to(tl.int64) * Q_STRIDE + c
    cos, sin = _cos_sin(angle)
    tl.store(to, cos, mask=inside)
    tl.store(to + Q // 2, sin, mask=inside)


@triton.jit
def dynamic_rows(
    positions,
    token_slot,
    prompt_len,
    rows,
    tokens,
    THETA: tl.constexpr,
    FACTOR: tl.constexpr,
    ORIGINAL: tl.constexpr,
    POWER: tl.constexpr,
    Q: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotary rows under dynamic NTK scaling, each step rounded to fp32 as the reference rounds it.

    Angles reach 10⁵, where an error of one part in 10⁷ of a power turns the pair by 0.01: powers are
    computed in fp64 and rounded, which is what a correctly rounded fp32 power gives.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    position = tl.load(positions + t, mask=t < tokens, other=0)
    slot = tl.load(token_slot + t, mask=t < tokens, other=0)
    length = tl.maximum(tl.load(prompt_len + slot, mask=t < tokens, other=0), position + 1)
    length = tl.maximum(length, ORIGINAL).to(tl.float32)
    # fp64 holds the products of fp32 numbers exactly, so that nothing is contracted.
    grown = (length.to(tl.float64) * FACTOR).to(tl.float32)
    stretch = tl.div_rn(grown, tl.full((ROWS, 1), ORIGINAL, tl.float32)) - (FACTOR - 1)
    power = tl.exp2(tl.log2(stretch.to(tl.float64)) * POWER).to(tl.float32)
    base = (power.to(tl.float64) * THETA).to(tl.float32)
    _store_rows(rows, position, base, t, c, tokens, Q, Q_STRIDE, ROWS, WIDTH)


@triton.jit
def stepped_rows(
    positions,
    token_slot,
    prompt_len,
    rows,
    tokens,
    THETA: tl.constexpr,
    ORIGINAL: tl.constexpr,
    POWER: tl.constexpr,
    Q: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rotary rows whose base a prompt's length sets in steps of a doubling; see :func:`dynamic_rows`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    position = tl.load(positions + t, mask=t < tokens, other=0)
    slot = tl.load(token_slot + t, mask=t < tokens, other=0)
    length = tl.load(prompt_len + slot, mask=t < tokens, other=0).to(tl.int64)
    doubled = tl.full((ROWS, 1), 2, tl.int64)  # 2 ** (doublings of ORIGINAL that hold the prompt + 1)
    for k in tl.static_range(24):
        doubled = tl.where(length > (ORIGINAL << k), doubled * 2, doubled)
    base = tl.exp2(tl.log2((doubled - 1).to(tl.float64)) * POWER) * THETA
    base = base.to(tl.float32)
    _store_rows(rows, position, base, t, c, tokens, Q, Q_STRIDE, ROWS, WIDTH)


@triton.jit
def logn_rows(
    rows,
    positions,
    scaled,
    tokens,
    ORIGINAL: tl.constexpr,
    Q: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """``scaled = rows * max(1, log(position + 1) / log(ORIGINAL))``."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    inside = (t < tokens) & (c < Q)
    length = tl.load(positions + t, mask=t < tokens, other=0).to(tl.float64) + 1
    longer = tl.maximum(tl.log2(length) / tl.log2(tl.full((ROWS, 1), ORIGINAL, tl.float64)), 1.0)
    t = t.to(tl.int64)
    x = tl.load(rows + t * Q_STRIDE + c, mask=inside, other=0.0).to(tl.float64)
    tl.store(scaled + t * OUT_STRIDE + c, (x * longer).to(tl.float32), mask=inside)


@cuda_kernel(rope, "tiles", invariant=True)
def rope_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`rotate_heads`."""
    tensors = call.tensors
    heads, head_dim = call.attrs["heads"], call.attrs["head_dim"]
    tokens, rotary = tensors["rows"].shape
    assert isinstance(tokens, int)
    assert isinstance(rotary, int)
    tiles = row_tiles(
        tokens * heads,
        rotary // 2,
        multiprocessors=call.multiprocessors,
        invariant=call.invariant,
        whole_rows=True,
    )
    pdl = "pdl" in call.features
    launch = DeviceLaunch(
        function="makeready.kernels.rope_triton:rotate_heads",
        constants={
            "HEADS": heads,
            "D": head_dim,
            "Q": rotary,
            "X_STRIDE": tensors["x"].row_stride,
            "Q_STRIDE": tensors["rows"].row_stride,
            "Y_STRIDE": tensors["y"].row_stride,
            "ROWS": tiles.rows,
            "WIDTH": tiles.width,
            "REST": power_of_two(head_dim - rotary),
            "PDL": pdl,
        },
        arguments={
            **{name: Pointer(name) for name in ("x", "rows", "y")},
            "count": Scalar(tokens * heads, "int32"),
        },
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(rope_rows, "tiles", invariant=True)
def rope_rows_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`~.embedding_triton.gather_rows`."""
    return gather_launch(call, source="table", index="positions", result="rows")


@cuda_kernel(rope_rows_dynamic, "tiles", invariant=True)
def rope_rows_dynamic_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`dynamic_rows`."""
    rotary = call.attrs["rotary_dim"]
    constants = {
        "THETA": call.attrs["theta"],
        "FACTOR": call.attrs["factor"],
        "ORIGINAL": call.attrs["original_context"],
        "POWER": c_float(rotary / (rotary - 2)).value,  # fp32, as the reference's
        "Q": rotary,
        "Q_STRIDE": call.tensors["rows"].row_stride,
    }
    return _by_tokens(call, "dynamic_rows", constants, _PLACES, rotary // 2)


@cuda_kernel(rope_rows_stepped, "tiles", invariant=True)
def rope_rows_stepped_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`stepped_rows`."""
    rotary = call.attrs["rotary_dim"]
    constants = {
        "THETA": call.attrs["theta"],
        "ORIGINAL": call.attrs["original_context"],
        "POWER": rotary / (rotary - 2),
        "Q": rotary,
        "Q_STRIDE": call.tensors["rows"].row_stride,
    }
    return _by_tokens(call, "stepped_rows", constants, _PLACES, rotary // 2)


@cuda_kernel(rope_rows_logn, "tiles", invariant=True)
def rope_rows_logn_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`logn_rows`."""
    rotary = call.dims["Q"]
    constants = {
        "ORIGINAL": call.attrs["original_context"],
        "Q": rotary,
        "Q_STRIDE": call.tensors["rows"].row_stride,
        "OUT_STRIDE": call.tensors["scaled"].row_stride,
    }
    return _by_tokens(call, "logn_rows", constants, ("rows", "positions", "scaled"), rotary)


def _by_tokens(
    call: OpCall, function: str, constants: dict[str, Any], names: Sequence[str], width: int
) -> Sequence[Candidate]:
    """A launch over tokens, each with all of its ``width`` elements."""
    tiles = row_tiles(
        call.dims["T"], width, multiprocessors=call.multiprocessors, invariant=call.invariant, whole_rows=True
    )
    pdl = "pdl" in call.features
    launch = DeviceLaunch(
        function=f"{__name__}:{function}",
        constants={**constants, "ROWS": tiles.rows, "WIDTH": tiles.width, "PDL": pdl},
        arguments={**{name: Pointer(name) for name in names}, "tokens": Scalar(call.dims["T"], "int32")},
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)
