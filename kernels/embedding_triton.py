"""Rows fetched by an index, on GPUs.

# C columns of a row
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.embedding import embedding
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import row_tiles


@triton.jit
def gather_rows(
    source,
    index,
    length,
    out,
    rows,
    C: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out[r] = source[index[r]]``; with ``length``, the last of so many rows from ``index[r]`` on.

    Row 0 stands in where ``length`` is 0 and no row comes before ``index``.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    row = (tile // COLUMNS) * ROWS + tl.arange(0, ROWS)[:, None]
    c = (tile % COLUMNS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    place = tl.load(index + row, mask=row < rows, other=0)
    if length is not None:
        place = tl.maximum(place + tl.load(length + row, mask=row < rows, other=0) - 1, 0)
    inside = (row < rows) & (c < C)
    value = tl.load(source + place.to(tl.int64) * SOURCE_STRIDE + c, mask=inside)
    tl.store(out + row.to(tl.int64) * OUT_STRIDE + c, value.to(out.dtype.element_ty), mask=inside)


def gather_launch(
    call: OpCall, *, source: str, index: str, result: str, length: str | None = None
) -> Sequence[Candidate]:
    """The launch of :func:`gather_rows` over operands and result of these names."""
    rows, width = call.tensors[result].shape
    assert isinstance(rows, int)
    assert isinstance(width, int)
    tiles = row_tiles(rows, width, multiprocessors=call.multiprocessors, invariant=call.invariant)
    pdl = "pdl" in call.features
    constants = {
        "C": width,
        "SOURCE_STRIDE": call.tensors[source].row_stride,
        "OUT_STRIDE": call.tensors[result].row_stride,
        "ROWS": tiles.rows,
        "WIDTH": tiles.width,
        "COLUMNS": tiles.columns,
        "PDL": pdl,
    }
    arguments: dict[str, Argument] = {
        "source": Pointer(source),
        "index": Pointer(index),
        "out": Pointer(result),
        "rows": Scalar(rows, "int32"),
    }
    if length:
        arguments["length"] = Pointer(length)
    else:
        constants["length"] = None
    launch = DeviceLaunch(
        function="makeready.kernels.embedding_triton:gather_rows",
        constants=constants,
        arguments=arguments,
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(embedding, "tiles", invariant=True)
def embedding_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`gather_rows`."""
    return gather_launch(call, source="weight", index="ids", result="x")
