"""Quantization to 8-bit floats and integers on GPUs: one sweep, groups held in registers.

# C columns of a result
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.quantize import (
    FP8_MAX,
    LEAST_SCALE,
    quantize_fp8,
    quantize_fp8_block,
    quantize_fp8_static,
    silu_mul_quantize_fp8,
)
from makeready.kernels.quantize_int8 import (
    INT8_MAX,
    quantize_int8,
    quantize_int8_static,
    silu_mul_quantize_int8,
)
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two, row_tiles

_FLOAT_MAX = tl.constexpr(FP8_MAX)
_INTEGER_MAX = tl.constexpr(INT8_MAX)
_WHOLE = tl.constexpr(1.5 * 2**23)  # floats around it are the integers
_LEAST = tl.constexpr(LEAST_SCALE)
_SIDES = (16, 32, 64, 128)  # of squares that a block of threads holds


@triton.jit
def magnitude(x, INTEGERS: tl.constexpr):
    """``|x|``, from which scales are made. NaN has no 8-bit integer, so there it counts as infinite."""
    if INTEGERS:
        return tl.where(x == x, tl.abs(x), float("inf"))
    return tl.abs(x)


@triton.jit
def scale_of(largest, INTEGERS: tl.constexpr):
    """The scale that makes ``largest`` the format's largest number; the reference's bits."""
    if INTEGERS:
        return tl.maximum(tl.div_rn(largest, _INTEGER_MAX), _LEAST)
    return tl.maximum(tl.div_rn(largest, _FLOAT_MAX), _LEAST)


@triton.jit
def divide(x, scale):
    """``x / scale`` as correctly rounded division gives it, but for one division a scale: halfway cases between
    two 8-bit numbers, which short mantissas often make, must fall to the same side as in the reference.
    """
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    near = x * inverse
    return tl.fma(tl.fma(-near, scale, x), inverse, near)


@triton.jit
def narrow(x, kind: tl.constexpr):
    """``x`` as an 8-bit float or integer, to the nearest one, ties to even; integers saturate at 127."""
    if kind == tl.int8:
        x = tl.clamp(x, -_INTEGER_MAX, _INTEGER_MAX)
        return ((x + _WHOLE) - _WHOLE).to(kind)
    return x.to(kind)


@triton.jit
def store_quantized(
    wide, q, scale, row, c, tile_group, inside, row_inside,
    C: tl.constexpr, GROUP: tl.constexpr, Q_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Quantize ``wide[ROWS, WIDTH]`` by groups and store it.

    Args:
        wide: fp32, zero where not ``inside``.
        row, c: ``[ROWS, 1]`` and ``[1, WIDTH]``, places in the result.
        tile_group: the first group of the tile.
        row_inside: ``[ROWS, 1]``.
        GROUP: columns of a group: a power of two that divides ``WIDTH``, or C where that is all of the tile.
    """
    SPAN: tl.constexpr = WIDTH if GROUP == C else GROUP
    grouped = tl.reshape(wide, (ROWS, WIDTH // SPAN, SPAN))
    INTEGERS: tl.constexpr = q.dtype.element_ty == tl.int8
    scales = scale_of(tl.max(magnitude(grouped, INTEGERS), 2), INTEGERS)
    small = tl.reshape(divide(grouped, scales[:, :, None]), (ROWS, WIDTH))
    tl.store(q + row * Q_STRIDE + c, narrow(small, q.dtype.element_ty), mask=inside)
    group = tile_group + tl.arange(0, WIDTH // SPAN)[None, :]
    tl.store(scale + row * SCALE_STRIDE + group, scales, mask=row_inside & (group < C // GROUP))


@triton.jit
def quantize_tiles(
    x,
    q,
    scale,
    rows,
    SILU: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize ``x``, or where ``SILU`` silu(x) times what stands C columns behind, by groups of a row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    row = (tile // COLUMNS) * ROWS + tl.arange(0, ROWS)[:, None]
    c = (tile % COLUMNS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    row_inside = row < rows
    inside = row_inside & (c < C)
    row = row.to(tl.int64)
    wide = tl.load(x + row * X_STRIDE + c, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        up = tl.load(x + row * X_STRIDE + (C + c), mask=inside, other=0.0).to(tl.float32)
        # Rounded as the unfused op would store it.
        wide = (wide * tl.sigmoid(wide) * up).to(x.dtype.element_ty).to(tl.float32)
    first = 0 if GROUP == C else (tile % COLUMNS) * (WIDTH // GROUP)
    store_quantized(
        wide, q, scale, row, c, first, inside, row_inside, C, GROUP, Q_STRIDE, SCALE_STRIDE, ROWS, WIDTH
    )


@triton.jit
def quantize_static(
    x,
    scale,
    q,
    row_scale,
    rows,
    C: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize ``x`` by one scale that is given; the block of a row's first columns repeats it. Integers need whole
    rows in a tile: those that are not all finite have an infinite scale.
    """
    known = tl.load(scale)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    row = (tile // COLUMNS) * ROWS + tl.arange(0, ROWS)[:, None]
    c = (tile % COLUMNS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (c < C)
    row = row.to(tl.int64)
    wide = tl.load(x + row * X_STRIDE + c, mask=inside, other=0.0).to(tl.float32)
    # Saturated before the division, whose correction would take what overflows for an error.
    INTEGERS: tl.constexpr = q.dtype.element_ty == tl.int8
    MAX: tl.constexpr = _INTEGER_MAX if INTEGERS else _FLOAT_MAX
    own = tl.full((ROWS, 1), 1.0, tl.float32) * known
    small = divide(tl.clamp(wide, -MAX * known, MAX * known, propagate_nan=tl.PropagateNan.ALL), own)
    tl.store(q + row * Q_STRIDE + c, narrow(small, q.dtype.element_ty), mask=inside)
    if INTEGERS:
        largest = tl.max(magnitude(wide, INTEGERS), 1, keep_dims=True)
        own = tl.where(largest < float("inf"), own, float("inf"))
    tl.store(row_scale + row, own, mask=(row < rows) & (tile % COLUMNS == 0))


@triton.jit
def quantize_squares(
    x,
    q,
    scale,
    rows,
    C: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    SIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize one square of ``SIDE`` rows and columns a block; squares of a row of squares run together."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    columns: tl.constexpr = (C + SIDE - 1) // SIDE
    square = tl.program_id(0)
    row = (square // columns) * SIDE + tl.arange(0, SIDE)[:, None]
    c = (square % columns) * SIDE + tl.arange(0, SIDE)[None, :]
    inside = (row < rows) & (c < C)
    row = row.to(tl.int64)
    wide = tl.load(x + row * X_STRIDE + c, mask=inside, other=0.0).to(tl.float32)
    # Along one axis after the other: of a reshaped square, threads would hold copies where stores are narrow.
    own = scale_of(tl.max(tl.max(tl.abs(wide), 1, keep_dims=True), 0, keep_dims=True), False)
    tl.store(q + row * Q_STRIDE + c, divide(wide, own).to(q.dtype.element_ty), mask=inside)
    tl.store(scale + square + tl.zeros((1, 1), tl.int32), own)


def groups_fit(call: OpCall, width: int) -> bool:
    """Whether groups are whole rows or powers of two, which is what a tile of registers is cut into."""
    group = call.attrs["group"]
    return group == width or (power_of_two(group) == group and width % group == 0)


def _width(call: OpCall) -> int:
    width = call.tensors["q"].shape[1]
    assert isinstance(width, int)
    return width


def _fits(call: OpCall) -> bool:
    return groups_fit(call, _width(call))


def _tiles(call: OpCall, source: str) -> Sequence[Candidate]:
    width, group, rows = _width(call), call.attrs["group"], call.dims["T"]
    whole = group == width
    tiles = row_tiles(
        rows,
        width,
        multiprocessors=call.multiprocessors,
        invariant=call.invariant,
        whole_rows=whole or group > 2048,
    )
    pdl = "pdl" in call.features
    launch = DeviceLaunch(
        function="makeready.kernels.quantize_triton:quantize_tiles",
        constants={
            "SILU": source == "gate_up",
            "C": width,
            "GROUP": group,
            "X_STRIDE": call.tensors[source].row_stride,
            "Q_STRIDE": call.tensors["q"].row_stride,
            "SCALE_STRIDE": call.tensors["scale"].row_stride,
            "ROWS": tiles.rows,
            "WIDTH": tiles.width,
            "COLUMNS": tiles.columns,
            "PDL": pdl,
        },
        arguments={
            "x": Pointer(source),
            "q": Pointer("q"),
            "scale": Pointer("scale"),
            "rows": Scalar(rows, "int32", specialize=False),
        },
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(quantize_fp8, "tiles", features=("fp8",), applies=_fits, invariant=True)
def quantize_fp8_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_tiles`."""
    return _tiles(call, "x")


@cuda_kernel(silu_mul_quantize_fp8, "tiles", features=("fp8",), applies=_fits, invariant=True)
def silu_mul_quantize_fp8_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_tiles`."""
    return _tiles(call, "gate_up")


@cuda_kernel(quantize_int8, "tiles", applies=_fits, invariant=True)
def quantize_int8_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_tiles`."""
    return _tiles(call, "x")


@cuda_kernel(silu_mul_quantize_int8, "tiles", applies=_fits, invariant=True)
def silu_mul_quantize_int8_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_tiles`."""
    return _tiles(call, "gate_up")


@cuda_kernel(quantize_fp8_static, "tiles", features=("fp8",), invariant=True)
def quantize_fp8_static_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_static`."""
    return _static(call, whole_rows=False)


@cuda_kernel(quantize_int8_static, "tiles", invariant=True)
def quantize_int8_static_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_static`."""
    return _static(call, whole_rows=True)


def _static(call: OpCall, *, whole_rows: bool) -> Sequence[Candidate]:
    width, rows = _width(call), call.dims["T"]
    tiles = row_tiles(
        rows,
        width,
        multiprocessors=call.multiprocessors,
        invariant=call.invariant,
        whole_rows=whole_rows,
    )
    pdl = "pdl" in call.features
    launch = DeviceLaunch(
        function="makeready.kernels.quantize_triton:quantize_static",
        constants={
            "C": width,
            "X_STRIDE": call.tensors["x"].row_stride,
            "Q_STRIDE": call.tensors["q"].row_stride,
            "ROWS": tiles.rows,
            "WIDTH": tiles.width,
            "COLUMNS": tiles.columns,
            "PDL": pdl,
        },
        arguments={
            **{name: Pointer(name) for name in ("x", "scale", "q", "row_scale")},
            "rows": Scalar(rows, "int32", specialize=False),
        },
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
        early=("scale",),
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(
    quantize_fp8_block,
    "squares",
    features=("fp8",),
    applies=lambda call: call.attrs["block"] in _SIDES,
    invariant=True,
)
def quantize_fp8_block_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_squares`."""
    width, rows, side = _width(call), call.dims["N"], call.attrs["block"]
    pdl = "pdl" in call.features
    arguments: dict[str, Argument] = {name: Pointer(name) for name in ("x", "q", "scale")}
    launch = DeviceLaunch(
        function="makeready.kernels.quantize_triton:quantize_squares",
        constants={
            "C": width,
            "X_STRIDE": call.tensors["x"].row_stride,
            "Q_STRIDE": call.tensors["q"].row_stride,
            "SIDE": side,
            "PDL": pdl,
        },
        arguments={**arguments, "rows": Scalar(rows, "int32", specialize=False)},
        grid=(-(-rows // side) * -(-width // side), 1, 1),
        num_warps=max(1, side * side // 2048),
        dependent=pdl,
    )
    return (Candidate(f"{side}x{side}", (launch,)),)
