"""Weights of 4 or 8 bits made for kernels on GPUs, while they are loaded; see kernels/integers.py.

A block of threads has the words of one span of some outputs, or what 64 outputs have for some groups.

# N outputs, K inputs, J words along the outputs, G groups
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.integers import (
    LEAST_SCALE,
    SPAN,
    TILE,
    dequantize_int,
    gather_columns,
    order_of_groups,
    quantize_int,
    repack_awq,
    repack_pairs,
    repack_rows,
    tile_scales,
    unpack_zeros,
)
from makeready.kernels.mx import repack_bytes
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import row_tiles

_SPAN = tl.constexpr(SPAN)
_TILE = tl.constexpr(TILE)
_LEAST = tl.constexpr(LEAST_SCALE)
_ROWS = 64  # outputs of a block: a tile of scales
_GROUPS = 16  # groups of a block
_PLACES = 128  # of a block that sorts


@triton.jit
def repack_words(
    q, order, weight, N, K: tl.constexpr, Q_STRIDE: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Words of one span from ``PER`` neighbouring inputs in a number; ``order`` None: they stay as they are."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    COUNT: tl.constexpr = 8 * BITS
    span = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COUNT)[None, :]
    made = tl.zeros((ROWS, COUNT), tl.int32)
    for field in tl.static_range(16 // BITS):
        k = span * _SPAN + field * COUNT + j
        inside = (n < N) & (k < K)
        if order is not None:
            k = tl.load(order + k, mask=k < K, other=0)
        found = tl.load(q + n * Q_STRIDE + k // PER, mask=inside, other=0).to(tl.int32)
        made |= ((found >> (k % PER * BITS)) & (2**BITS - 1)) << (BITS * field)
    words: tl.constexpr = (K + _SPAN - 1) // _SPAN * COUNT
    tl.store(weight + n * words + span * COUNT + j, made.to(tl.int16), mask=n < N)


@triton.jit
def repack_outputs(
    q,
    weight,
    J,
    K: tl.constexpr,
    PER: tl.constexpr,
    LIFT: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Words of one span of ``PER * ROWS`` outputs from ``PER`` outputs in a number, 8 in AWQ's order or 2.

    ``LIFT`` is added to each, modulo 16.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    span = tl.program_id(0)
    j = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, 32)[None, :]
    words: tl.constexpr = (K + _SPAN - 1) // _SPAN * 32
    for part in tl.static_range(PER):
        made = tl.zeros((ROWS, 32), tl.int32)
        for field in tl.static_range(4):
            k = span * _SPAN + field * 32 + i
            found = tl.load(q + j * K + k, mask=(j < J) & (k < K), other=0).to(tl.int32)
            number = ((found >> (4 * part)) + LIFT) & 15
            made |= tl.where(k < K, number, 0) << (4 * field)
        output = part % 4 * 2 + part // 4 if PER == 8 else part  # 0 2 4 6 1 3 5 7
        tl.store(weight + (PER * j + output) * words + span * 32 + i, made.to(tl.int16), mask=j < J)


@triton.jit
def tile_zeros(
    q, zero, J, G: tl.constexpr, BITS: tl.constexpr, PLUS: tl.constexpr, AWQ: tl.constexpr,
    GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Zeros of 64 outputs and some groups from neighbouring outputs in 32 bits."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    PER: tl.constexpr = 32 // BITS
    i = tl.arange(0, _TILE)[None, :]
    g = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    tile = tl.program_id(1).to(tl.int64)
    n = tile * _TILE + i
    field = n % PER
    if AWQ:
        field = field // 2 + field % 2 * 4
    found = tl.load(q + n // PER * G + g, mask=(n // PER < J) & (g < G), other=0)
    made = ((found >> (field * BITS).to(tl.int32)) + PLUS) & (2**BITS - 1)
    made = tl.where(n // PER < J, made, 0)
    tl.store(zero + (tile * G + g) * _TILE + i, made.to(tl.uint8), mask=g < G)


@triton.jit
def tile_rows(scale, tiled, N, G: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr):
    """Scales of 64 outputs and some groups."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.arange(0, _TILE)[None, :]
    g = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    tile = tl.program_id(1).to(tl.int64)
    n = tile * _TILE + i
    found = tl.load(scale + n * G + g, mask=(n < N) & (g < G), other=0)
    tl.store(tiled + (tile * G + g) * _TILE + i, found, mask=g < G)


@triton.jit
def sort_groups(group, order, K: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr):
    """Where each input goes: behind all of lower groups, and those before it in its own."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    own = tl.load(group + i, mask=i < K, other=0)
    place = tl.zeros((PLACES,), tl.int32)
    for first in range(0, K, PLACES):
        j = first + tl.arange(0, PLACES)
        other = tl.load(group + j, mask=j < K, other=2**31 - 1)
        before = (other[None, :] < own[:, None]) | (
            (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        )
        place += tl.sum((before & (j[None, :] < K)).to(tl.int32), 1)
    tl.store(order + place, i, mask=i < K)


@triton.jit
def quantize_spans(
    x, weight, scale, N, K: tl.constexpr, X_STRIDE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One span of 64 outputs, which is a group, to integers and its scales."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    COUNT: tl.constexpr = 8 * BITS
    FIELDS: tl.constexpr = 16 // BITS
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    spans: tl.constexpr = (K + _SPAN - 1) // _SPAN
    span, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, ROWS)
    n, j = tile * ROWS + i[:, None], tl.arange(0, COUNT)[None, :]
    most = tl.zeros((ROWS,), tl.float32)
    for field in tl.static_range(FIELDS):
        k = span * _SPAN + field * COUNT + j
        part = tl.load(x + n * X_STRIDE + k, mask=(n < N) & (k < K), other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(part), 1))
    own = tl.minimum(tl.maximum(tl.div_rn(most, MIDDLE - 0.5), _LEAST), 65504.0).to(tl.float16)
    tl.store(scale + (tile * spans + span) * ROWS + i, tl.where(tile * ROWS + i < N, own, 0.0))
    step = own.to(tl.float32)[:, None] + tl.zeros((ROWS, COUNT), tl.float32)
    made = tl.zeros((ROWS, COUNT), tl.int32)
    for field in tl.static_range(FIELDS):
        k = span * _SPAN + field * COUNT + j
        part = tl.load(x + n * X_STRIDE + k, mask=(n < N) & (k < K), other=0.0).to(tl.float32)
        # To the nearest, ties to even: behind 1.5 * 2^23 there is no room for a fraction.
        nearest = (tl.div_rn(part, step) + 12582912.0) - 12582912.0
        q = tl.minimum(tl.maximum(nearest, -MIDDLE), MIDDLE - 1).to(tl.int32) + MIDDLE
        made |= tl.where(k < K, q, 0) << (BITS * field)
    tl.store(weight + n * (spans * COUNT) + span * COUNT + j, made.to(tl.int16), mask=n < N)


@triton.jit
def dequantize_spans(
    weight, scale, zero, order, x, N, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One span of 64 outputs as what it stands for."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    COUNT: tl.constexpr = 8 * BITS
    spans: tl.constexpr = (K + _SPAN - 1) // _SPAN
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    span, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, ROWS)[:, None]
    n, j = tile * ROWS + i, tl.arange(0, COUNT)[None, :]
    words = tl.load(weight + n * (spans * COUNT) + span * COUNT + j, mask=n < N, other=0).to(tl.int32)
    for field in tl.static_range(16 // BITS):
        k = span * _SPAN + field * COUNT + j
        at = (tile * groups + k // GROUP) * ROWS + i
        q = (words >> (BITS * field)) & (2**BITS - 1)
        if zero is not None:
            q -= tl.load(zero + at, mask=k < K, other=0).to(tl.int32)
        else:
            q -= 2 ** (BITS - 1)
        wide = q.to(tl.float32) * tl.load(scale + at, mask=k < K, other=0.0).to(tl.float32)
        to = k
        if order is not None:
            to = tl.load(order + k, mask=k < K, other=0)
        tl.store(x + n * K + to, wide.to(x.dtype.element_ty), mask=(n < N) & (k < K))


@triton.jit
def gather_rows(
    x, order, y, rows, C: tl.constexpr, X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns ``order`` of ``x``."""
    tile = tl.program_id(0)
    c = (tile % COLUMNS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    source = tl.load(order + c, mask=c < C, other=0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = (tile // COLUMNS) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < rows) & (c < C)
    row = row.to(tl.int64)
    tl.store(y + row * Y_STRIDE + c, tl.load(x + row * X_STRIDE + source, mask=inside), mask=inside)


def _launch(
    call: OpCall,
    function: str,
    grid: tuple[int, int],
    names: Sequence[str],
    constants: dict[str, Any],
    **sizes: int,
) -> tuple[Candidate, ...]:
    """One way: pointers ``names`` of which absent ones are None, and ``sizes`` that differ between runs."""
    dependent = "pdl" in call.features
    arguments: dict[str, Argument] = {name: Pointer(name) for name in names if name in call.tensors}
    arguments |= {name: Scalar(value, "int32", specialize=False) for name, value in sizes.items()}
    absent = {name: None for name in names if name not in call.tensors}
    launch = DeviceLaunch(
        function=f"makeready.kernels.integers_triton:{function}",
        constants={**constants, **absent, "PDL": dependent},
        arguments=arguments,
        grid=(*grid, 1),
        num_warps=4,
        dependent=dependent,
    )
    return (Candidate(function, (launch,)),)


def _spans(inputs: int, outputs: int, rows: int = _ROWS) -> tuple[int, int]:
    return -(-inputs // SPAN), -(-outputs // rows)


@cuda_kernel(repack_rows, "spans", invariant=True)
def repack_rows_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`repack_words`."""
    bits = call.attrs["bits"]
    return _repack(call, bits, 32 // bits)


@cuda_kernel(repack_bytes, "spans", invariant=True)
def repack_bytes_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`repack_words`."""
    return _repack(call, 4, 2)


def _repack(call: OpCall, bits: int, per: int) -> Sequence[Candidate]:
    inputs, outputs = call.attrs["inputs"], call.dims["N"]
    stride = call.tensors["q"].row_stride
    constants = {"K": inputs, "Q_STRIDE": stride, "BITS": bits, "PER": per, "ROWS": _ROWS}
    names = ("q", "order", "weight")
    return _launch(call, "repack_words", _spans(inputs, outputs), names, constants, N=outputs)


@cuda_kernel(repack_awq, "spans", invariant=True)
def repack_awq_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`repack_outputs`."""
    return _repack_outputs(call, 8, 0)


@cuda_kernel(repack_pairs, "spans", invariant=True)
def repack_pairs_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`repack_outputs`."""
    return _repack_outputs(call, 2, 8)


def _repack_outputs(call: OpCall, per: int, lift: int) -> Sequence[Candidate]:
    inputs, count, rows = call.dims["K"], call.dims["J"], _ROWS // per
    constants = {"K": inputs, "PER": per, "LIFT": lift, "ROWS": rows}
    return _launch(call, "repack_outputs", _spans(inputs, count, rows), ("q", "weight"), constants, J=count)


@cuda_kernel(unpack_zeros, "tiles", invariant=True)
def unpack_zeros_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`tile_zeros`."""
    groups, count, attrs = call.dims["G"], call.dims["J"], call.attrs
    constants = {
        "G": groups,
        "BITS": attrs["bits"],
        "PLUS": attrs["plus"],
        "AWQ": attrs["awq"],
        "GROUPS": _GROUPS,
    }
    grid = (-(-groups // _GROUPS), int(call.tensors["zero"].shape[0]))
    return _launch(call, "tile_zeros", grid, ("q", "zero"), constants, J=count)


@cuda_kernel(tile_scales, "tiles", invariant=True)
def tile_scales_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`tile_rows`."""
    groups, outputs = call.dims["G"], call.dims["N"]
    constants = {"G": groups, "GROUPS": _GROUPS}
    grid = (-(-groups // _GROUPS), -(-outputs // TILE))
    return _launch(call, "tile_rows", grid, ("scale", "tiled"), constants, N=outputs)


@cuda_kernel(order_of_groups, "places", invariant=True)
def order_of_groups_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`sort_groups`."""
    constants = {"K": call.dims["K"], "PLACES": _PLACES}
    return _launch(call, "sort_groups", (-(-call.dims["K"] // _PLACES), 1), ("group", "order"), constants)


@cuda_kernel(quantize_int, "spans", applies=lambda call: call.attrs["group"] == SPAN, invariant=True)
def quantize_int_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_spans`."""
    inputs, outputs = call.dims["K"], call.dims["N"]
    constants = {
        "K": inputs,
        "X_STRIDE": call.tensors["x"].row_stride,
        "BITS": call.attrs["bits"],
        "ROWS": TILE,
    }
    names = ("x", "weight", "scale")
    return _launch(call, "quantize_spans", _spans(inputs, outputs), names, constants, N=outputs)


@cuda_kernel(dequantize_int, "spans", invariant=True)
def dequantize_int_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`dequantize_spans`."""
    inputs, outputs = call.attrs["inputs"], call.dims["N"]
    constants = {"K": inputs, "BITS": call.attrs["bits"], "GROUP": call.attrs["group"], "ROWS": TILE}
    names = ("weight", "scale", "zero", "order", "x")
    return _launch(call, "dequantize_spans", _spans(inputs, outputs), names, constants, N=outputs)


@cuda_kernel(gather_columns, "tiles", invariant=True)
def gather_columns_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`gather_rows`."""
    x, y = call.tensors["x"], call.tensors["y"]
    rows, width = call.dims["T"], call.dims["K"]
    tiles = row_tiles(rows, width, multiprocessors=call.multiprocessors, invariant=call.invariant)
    dependent = "pdl" in call.features
    arguments: dict[str, Argument] = {name: Pointer(name) for name in ("x", "order", "y")}
    launch = DeviceLaunch(
        function="makeready.kernels.integers_triton:gather_rows",
        constants={
            "C": width,
            "X_STRIDE": x.row_stride,
            "Y_STRIDE": y.row_stride,
            "ROWS": tiles.rows,
            "WIDTH": tiles.width,
            "COLUMNS": tiles.columns,
            "PDL": dependent,
        },
        arguments={**arguments, "rows": Scalar(rows, "int32", specialize=False)},
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=dependent,
        early=("order",),
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)
