"""8-bit floats and integers with scales made wide on GPUs, while weights are loaded: one sweep.

# C columns
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.quantize import dequantize_fp8, dequantize_fp8_block
from makeready.kernels.quantize_int8 import dequantize_int8
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import row_tiles


@triton.jit
def dequantize_tiles(
    q,
    scale,
    x,
    rows,
    C: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """``x = q * scale``; ``TALL`` rows and ``WIDE`` columns share a scale."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    row = (tile // COLUMNS) * ROWS + tl.arange(0, ROWS)[:, None]
    c = (tile % COLUMNS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (c < C)
    row = row.to(tl.int64)
    by = tl.load(scale + (row // TALL) * SCALE_STRIDE + c // WIDE, mask=inside, other=0.0)
    wide = tl.load(q + row * Q_STRIDE + c, mask=inside, other=0.0).to(tl.float32) * by
    tl.store(x + row * X_STRIDE + c, wide.to(x.dtype.element_ty), mask=inside)


def _tiles(call: OpCall, tall: int, wide: int, stride: int) -> Sequence[Candidate]:
    rows, width = call.dims["N"], call.dims["C"]
    tiles = row_tiles(rows, width, multiprocessors=call.multiprocessors, invariant=call.invariant)
    arguments: dict[str, Argument] = {name: Pointer(name) for name in ("q", "scale", "x")}
    pdl = "pdl" in call.features
    launch = DeviceLaunch(
        function="makeready.kernels.dequantize_triton:dequantize_tiles",
        constants={
            "C": width,
            "TALL": tall,
            "WIDE": wide,
            "SCALE_STRIDE": stride,
            "Q_STRIDE": call.tensors["q"].row_stride,
            "X_STRIDE": call.tensors["x"].row_stride,
            "ROWS": tiles.rows,
            "WIDTH": tiles.width,
            "COLUMNS": tiles.columns,
            "PDL": pdl,
        },
        arguments={**arguments, "rows": Scalar(rows, "int32", specialize=False)},
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(dequantize_fp8, "tiles", features=("fp8",), invariant=True)
def dequantize_fp8_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`dequantize_tiles`."""
    return _tiles(call, 1, call.dims["C"], 1)


@cuda_kernel(dequantize_int8, "tiles", invariant=True)
def dequantize_int8_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`dequantize_tiles`."""
    return _tiles(call, 1, call.dims["C"], 1)


@cuda_kernel(dequantize_fp8_block, "tiles", features=("fp8",), invariant=True)
def dequantize_fp8_block_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`dequantize_tiles`."""
    block = call.attrs["block"]
    return _tiles(call, block, block, call.tensors["scale"].row_stride)
