"""NVFP4 on the GPU while weights are loaded (kernels/nvfp4.py): its tiles of scales, wide weights rounded.

# N outputs, K inputs, G blocks of 16
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.integers import SPAN, TILE
from makeready.kernels.mx_triton import nearest_number
from makeready.kernels.mx_values_triton import e4m3_of
from makeready.kernels.nvfp4 import (
    LARGEST,
    LEAST,
    check_global_scales,
    make_global_scales,
    pair_scales,
    quantize_nvfp4,
)
from makeready.kernels.registry import cuda_kernel

_PAIRS = 16  # of a block that makes tiles
_ROWS, _WIDTH = 16, 128  # outputs of a block that goes through their inputs, and how many of those at once
_NAN = tl.constexpr(float("nan"))
_LARGEST = tl.constexpr(LARGEST)
_LEAST = tl.constexpr(LEAST)


@triton.jit
def pair_tiles(scale, paired, N, G: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr):
    """Pairs of scales of 64 outputs and some fields."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    fields: tl.constexpr = (G + 1) // 2
    i = tl.arange(0, 64)[None, :]
    g = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]
    tile = tl.program_id(1).to(tl.int64)
    n = tile * 64 + i
    cells = scale + n * G + 2 * g
    first = tl.load(cells, mask=(n < N) & (2 * g < G), other=0.0).to(tl.uint8, bitcast=True)
    second = tl.load(cells + 1, mask=(n < N) & (2 * g + 1 < G), other=0.0).to(tl.uint8, bitcast=True)
    made = (first.to(tl.int32) | (second.to(tl.int32) << 8)).to(tl.int16)
    tl.store(paired + (tile * fields + g) * 64 + i, made, mask=g < fields)


@triton.jit
def check_rows(
    given, scale, global_scale, N, G: tl.constexpr, DIVIDES: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Global scales of some outputs, whose scales are gone through."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    damaged = tl.zeros((ROWS,), tl.int32)
    for first in range(0, G, WIDTH):
        g = first + tl.arange(0, WIDTH)[None, :]
        bits = tl.load(scale + n[:, None] * G + g, mask=(n < N)[:, None] & (g < G), other=0.0)
        bits = bits.to(tl.uint8, bitcast=True).to(tl.int32)
        damaged = tl.maximum(damaged, tl.max((((bits & 0x7F) == 0x7F) | (bits > 0x80)).to(tl.int32), 1))
    own = tl.load(given + n, mask=n < N, other=1.0)
    if DIVIDES:
        own = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), own)
    tl.store(global_scale + n, tl.where(damaged > 0, _NAN, own), mask=n < N)


@triton.jit
def largest_of_rows(
    x, global_scale, N, K: tl.constexpr, X_STRIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Global scales of some outputs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    most = tl.zeros((ROWS,), tl.int32)  # bits are ordered as magnitudes are, what is not finite behind them
    for first in range(0, K, WIDTH):
        k = first + tl.arange(0, WIDTH)[None, :]
        part = tl.load(x + n[:, None] * X_STRIDE + k, mask=(n < N)[:, None] & (k < K), other=0.0)
        bits = part.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        most = tl.maximum(most, tl.max(bits, 1))
    size = most.to(tl.float32, bitcast=True)
    own = tl.maximum(tl.div_rn(size, tl.full((ROWS,), _LARGEST, tl.float32)), _LEAST)
    tl.store(global_scale + n, tl.where(most >= 0x7F800000, _NAN, own), mask=n < N)


@triton.jit
def nearest_scale(v):
    """Bytes of e4m3 nearest to numbers up to 448 that have no sign, ties to even: int32."""
    bits = v.to(tl.int32, bitcast=True)
    usual = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # In steps of 2^-9 below 2^-6: behind 1.5 * 2^23 there is no room for a fraction.
    small = ((v * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.where(v < 0.015625, small, usual)


@triton.jit
def quantize_spans(
    x, global_scale, weight, scale, N, K: tl.constexpr, X_STRIDE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Numbers and scales of one span of 64 outputs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    spans: tl.constexpr = (K + 127) // 128
    fields: tl.constexpr = (K + 31) // 32
    span, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, 64)
    n, j = tile * 64 + i, tl.arange(0, 32)[None, :]
    whole = tl.load(global_scale + n, mask=n < N, other=1.0)
    made = tl.zeros((64, 32), tl.int32)
    for part in tl.static_range(4):
        field = 4 * span + part
        k = 32 * field + j
        bits = tl.load(x + n[:, None] * X_STRIDE + k, mask=(n < N)[:, None] & (k < K), other=0.0).to(
            tl.float32
        )
        size = tl.abs(bits)
        low = tl.max(tl.where(j < 16, size, 0.0), 1)
        high = tl.max(tl.where(j < 16, 0.0, size), 1)
        first = nearest_scale(tl.minimum(tl.div_rn(low, whole * 6.0), 448.0))
        second = nearest_scale(tl.minimum(tl.div_rn(high, whole * 6.0), 448.0))
        step = e4m3_of(tl.where(j < 16, first[:, None], second[:, None])) * whole[:, None]
        q = nearest_number(tl.where(step > 0.0, tl.div_rn(size, step), 0.0))
        q |= (bits.to(tl.int32, bitcast=True) >> 28) & 8
        sound = whole == whole
        made |= tl.where(sound[:, None], q, 0) << (4 * part)
        pair = tl.where(sound, first | (second << 8), 0).to(tl.int16)
        tl.store(scale + (tile * fields + field) * 64 + i, tl.where(n < N, pair, 0), mask=field < fields)
    tl.store(weight + n[:, None] * (spans * 32) + span * 32 + j, made.to(tl.int16), mask=(n < N)[:, None])


def _launch(
    call: OpCall, function: str, grid: tuple[int, int], names: Sequence[str], warps: int = 4, **constants: Any
) -> tuple[Candidate, ...]:
    dependent = "pdl" in call.features
    launch = DeviceLaunch(
        function=f"makeready.kernels.nvfp4_triton:{function}",
        constants={**constants, "PDL": dependent},
        arguments={
            **{name: Pointer(name) for name in names},
            "N": Scalar(call.dims["N"], "int32", specialize=False),
        },
        grid=(*grid, 1),
        num_warps=warps,
        dependent=dependent,
    )
    return (Candidate(function, (launch,)),)


@cuda_kernel(pair_scales, "tiles", invariant=True)
def pair_scales_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pair_tiles`."""
    outputs, groups = call.dims["N"], call.dims["G"]
    grid = (-(-groups // (2 * _PAIRS)), -(-outputs // TILE))
    return _launch(call, "pair_tiles", grid, ("scale", "paired"), G=groups, PAIRS=_PAIRS)


@cuda_kernel(check_global_scales, "rows", invariant=True)
def check_global_scales_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`check_rows`."""
    grid, names = (-(-call.dims["N"] // _ROWS), 1), ("given", "scale", "global_scale")
    sizes = {"G": call.dims["G"], "DIVIDES": call.attrs["divides"], "ROWS": _ROWS, "WIDTH": _WIDTH}
    return _launch(call, "check_rows", grid, names, **sizes)


@cuda_kernel(make_global_scales, "rows", invariant=True)
def make_global_scales_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`largest_of_rows`."""
    grid, stride = (-(-call.dims["N"] // _ROWS), 1), call.tensors["x"].row_stride
    sizes = {"K": call.dims["K"], "X_STRIDE": stride, "ROWS": _ROWS, "WIDTH": _WIDTH}
    return _launch(call, "largest_of_rows", grid, ("x", "global_scale"), **sizes)


@cuda_kernel(quantize_nvfp4, "spans", invariant=True)
def quantize_nvfp4_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_spans`."""
    inputs, stride = call.dims["K"], call.tensors["x"].row_stride
    grid = (-(-inputs // SPAN), -(-call.dims["N"] // TILE))
    names = ("x", "global_scale", "weight", "scale")
    # Divisions need so many registers that four warps had too few.
    return _launch(call, "quantize_spans", grid, names, warps=8, K=inputs, X_STRIDE=stride)
