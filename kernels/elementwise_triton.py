"""Element-by-element ops on GPUs.

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
from makeready.kernels.elementwise import (
    add,
    clamped_swiglu,
    concatenate,
    gather_last,
    gelu_tanh,
    gelu_tanh_mul,
    multiply,
    pad_columns,
    scale,
    scale_columns,
    sigmoid_gate,
    sigmoid_mul,
    silu,
    silu_mul,
)
from makeready.kernels.embedding_triton import gather_launch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import row_tiles


@triton.jit
def _gelu_tanh(x):
    """GELU by its tanh approximation: ``x * sigmoid(2 u)`` is ``x / 2 * (1 + tanh(u))``."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def clamped_swiglu_of(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Clamped SwiGLU of both in fp32."""
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return (up + 1.0) * (gate * tl.sigmoid(ALPHA * gate))


@triton.jit
def pointwise(
    x,
    y,
    out,
    rows,
    OP: tl.constexpr,
    BY: tl.constexpr,
    LIMIT: tl.constexpr,
    C: tl.constexpr,
    X_COLUMNS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out = OP(x, y)``; ``y`` is None for activations, and for gates, whose other factor stands C behind x.

    For scale_columns ``y`` is one row. For pad_columns ``x`` has but ``X_COLUMNS``, and zeros follow; for concatenate
    ``y`` does.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    row = (tile // COLUMNS) * ROWS + tl.arange(0, ROWS)[:, None]
    c = (tile % COLUMNS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (c < C)
    row = row.to(tl.int64)
    short: tl.constexpr = OP == "pad_columns" or OP == "concatenate"
    there = inside & (c < X_COLUMNS) if short else inside
    a = tl.load(x + row * X_STRIDE + c, mask=there, other=0.0).to(tl.float32)
    if OP == "silu_mul":
        b = tl.load(x + row * X_STRIDE + (C + c), mask=inside, other=0.0).to(tl.float32)
        a = a * tl.sigmoid(a) * b
    elif OP == "gelu_tanh_mul":
        b = tl.load(x + row * X_STRIDE + (C + c), mask=inside, other=0.0).to(tl.float32)
        a = _gelu_tanh(a) * b
    elif OP == "clamped_swiglu":
        b = tl.load(x + row * X_STRIDE + (C + c), mask=inside, other=0.0).to(tl.float32)
        a = clamped_swiglu_of(a, b, BY, LIMIT)
    elif OP == "silu":
        a *= tl.sigmoid(a)
    elif OP == "gelu_tanh":
        a = _gelu_tanh(a)
    elif OP == "scale":
        a *= BY
    elif OP == "sigmoid_gate":
        a *= tl.sigmoid(tl.load(y + row * Y_STRIDE, mask=row < rows, other=0.0))
    elif OP == "sigmoid_mul":
        a *= tl.sigmoid(tl.load(y + row * Y_STRIDE + c, mask=inside, other=0.0).to(tl.float32))
    elif OP == "concatenate":
        behind = c >= X_COLUMNS
        b = tl.load(y + row * Y_STRIDE + (c - X_COLUMNS), mask=inside & behind, other=0.0).to(tl.float32)
        a = tl.where(behind, b, a)
    elif OP != "pad_columns":
        b = tl.load(y + row * Y_STRIDE + c, mask=inside, other=0.0).to(tl.float32)
        a = a + b if OP == "add" else a * b
    tl.store(out + row * OUT_STRIDE + c, a.to(out.dtype.element_ty), mask=inside)


def _launch(call: OpCall, x: str, y: str | None, out: str) -> Sequence[Candidate]:
    result = call.tensors[out]
    rows, width = result.shape
    assert isinstance(rows, int)
    assert isinstance(width, int)
    tiles = row_tiles(rows, width, multiprocessors=call.multiprocessors, invariant=call.invariant)
    pdl = "pdl" in call.features
    constants = {
        "OP": call.op,
        "BY": call.attrs.get("alpha", call.attrs.get("by", 1.0)),
        "LIMIT": call.attrs.get("limit", 0.0),
        "C": width,
        "X_COLUMNS": call.tensors[x].shape[1],
        "X_STRIDE": call.tensors[x].row_stride,
        "Y_STRIDE": call.tensors[y].row_stride if y and len(call.tensors[y].shape) > 1 else 0,
        "OUT_STRIDE": result.row_stride,
        "ROWS": tiles.rows,
        "WIDTH": tiles.width,
        "COLUMNS": tiles.columns,
        "PDL": pdl,
    }
    arguments: dict[str, Argument] = {"x": Pointer(x), "out": Pointer(out), "rows": Scalar(rows, "int32")}
    if y:  # of a gate, the only column
        arguments["y"] = Pointer(y)
    else:
        constants["y"] = None
    launch = DeviceLaunch(
        function="makeready.kernels.elementwise_triton:pointwise",
        constants=constants,
        arguments=arguments,
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(add, "tiles", invariant=True)
def add_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", "y", "z")


@cuda_kernel(concatenate, "tiles", invariant=True)
def concatenate_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", "y", "z")


@cuda_kernel(multiply, "tiles", invariant=True)
def multiply_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", "y", "z")


@cuda_kernel(silu, "tiles", invariant=True)
def silu_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", None, "y")


@cuda_kernel(silu_mul, "tiles", invariant=True)
def silu_mul_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "gate_up", None, "y")


@cuda_kernel(gelu_tanh, "tiles", invariant=True)
def gelu_tanh_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", None, "y")


@cuda_kernel(gelu_tanh_mul, "tiles", invariant=True)
def gelu_tanh_mul_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "gate_up", None, "y")


@cuda_kernel(clamped_swiglu, "tiles", invariant=True)
def clamped_swiglu_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "gate_up", None, "y")


@cuda_kernel(scale, "tiles", invariant=True)
def scale_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", None, "y")


@cuda_kernel(scale_columns, "tiles", invariant=True)
def scale_columns_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", "scale", "y")


@cuda_kernel(sigmoid_gate, "tiles", invariant=True)
def sigmoid_gate_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", "gate", "y")


@cuda_kernel(sigmoid_mul, "tiles", invariant=True)
def sigmoid_mul_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", "gate", "y")


@cuda_kernel(pad_columns, "tiles", invariant=True)
def pad_columns_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pointwise`."""
    return _launch(call, "x", None, "y")


@cuda_kernel(gather_last, "tiles", invariant=True)
def gather_last_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`~.embedding_triton.gather_rows`."""
    return gather_launch(call, source="x", index="query_start", length="query_len", result="y")
