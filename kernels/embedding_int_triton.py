"""Rows of a table of integers with scales by groups, fetched by an index and widened, on GPUs.

# C columns of a row
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.embedding_int import embedding_int
from makeready.kernels.gemm.int_values_triton import of_group
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import row_tiles


@triton.jit
def gather_ints(
    ids, weight, weight_scale, weight_zero, x, rows, C: tl.constexpr, X_STRIDE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``x[r]`` is row ``ids[r]``; ``weight_zero`` holds offsets, or is None."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    COUNT: tl.constexpr = 8 * BITS
    words: tl.constexpr = (C + 127) // 128 * COUNT
    groups: tl.constexpr = (C + GROUP - 1) // GROUP
    tile = tl.program_id(0)
    row = (tile // COLUMNS) * ROWS + tl.arange(0, ROWS)[:, None]
    c = (tile % COLUMNS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (c < C)
    n = tl.load(ids + row, mask=row < rows, other=0).to(tl.int64)
    found = tl.load(weight + n * words + c // 128 * COUNT + c % COUNT, mask=inside, other=0).to(tl.int32)
    q = (found >> (c % 128 // COUNT * BITS)) & (2**BITS - 1)
    at = of_group(weight_scale, n, c, groups, GROUP)
    wide = (q - 2 ** (BITS - 1)).to(tl.float32) * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if weight_zero is not None:
        at = of_group(weight_zero, n, c, groups, GROUP)
        wide += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + row.to(tl.int64) * X_STRIDE + c, wide.to(x.dtype.element_ty), mask=inside)


@cuda_kernel(embedding_int, "tiles", invariant=True)
def embedding_int_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`gather_ints`."""
    x = call.tensors["x"]
    rows, width = (int(n) for n in x.shape)
    tiles = row_tiles(rows, width, multiprocessors=call.multiprocessors, invariant=call.invariant)
    dependent, offsets = "pdl" in call.features, "weight_zero" in call.tensors
    names = ("ids", "weight", "weight_scale", "x", *(("weight_zero",) if offsets else ()))
    constants: dict[str, Any] = {
        "C": width,
        "X_STRIDE": x.row_stride,
        "BITS": call.attrs["bits"],
        "GROUP": call.attrs["group"],
        "ROWS": tiles.rows,
        "WIDTH": tiles.width,
        "COLUMNS": tiles.columns,
        "PDL": dependent,
        **({} if offsets else {"weight_zero": None}),
    }
    launch = DeviceLaunch(
        function="makeready.kernels.embedding_int_triton:gather_ints",
        constants=constants,
        arguments={**{name: Pointer(name) for name in names}, "rows": Scalar(rows, "int32")},
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=dependent,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)
