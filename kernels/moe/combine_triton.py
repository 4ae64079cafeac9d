"""The weighted sum of a token's experts, on GPUs.

# C columns, k experts of a token
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.moe.combine_norm import (
    combine_add_rms_norm,
    combine_add_rms_norm_quantize_fp8,
    combine_add_rms_norm_quantize_int8,
)
from makeready.kernels.moe.route import combine
from makeready.kernels.quantize_triton import groups_fit, store_quantized
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two, row_tiles

assert isinstance(combine, Contract)
assert isinstance(combine_add_rms_norm, Contract)
assert isinstance(combine_add_rms_norm_quantize_fp8, Contract)
assert isinstance(combine_add_rms_norm_quantize_int8, Contract)


@triton.jit
def parts_of(x, place, share, t, c, inside, K: tl.constexpr, X_STRIDE: tl.constexpr):
    """Sums over a token's experts in their order; ``inside`` the tokens and their columns.

    Args:
        t, c: tokens and columns, of shapes that broadcast.
    """
    total = tl.zeros(inside.shape, tl.float32)
    for i in tl.static_range(K):
        at = tl.load(place + t * K + i, mask=t >= 0, other=-1)
        own = tl.load(share + t * K + i, mask=t >= 0, other=0.0)
        live = inside & (at >= 0)
        part = tl.load(x + at.to(tl.int64) * X_STRIDE + c, mask=live, other=0.0)
        total += tl.where(live, part.to(tl.float32) * own, 0.0)
    return total


@triton.jit
def combine_rows(
    x,
    place,
    share,
    out,
    C: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out[t] = sum over i of share[t, i] * x[place[t, i]]``; a tile of one row a block."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    columns: tl.constexpr = (C + WIDTH - 1) // WIDTH
    t = tl.program_id(0) // columns
    c = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)
    total = parts_of(x, place, share, t, c, c < C, K, X_STRIDE)
    tl.store(out + t.to(tl.int64) * OUT_STRIDE + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def combine_normalise(
    x,
    place,
    share,
    residual,
    weight,
    y,
    q,
    scale,
    residual_out,
    rows,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums of ``ROWS`` tokens a block, the residual added, and their norm: y, or quantized by groups of features.

    Args:
        y: None where it is quantized; q and scale None elsewhere.
    """
    c = tl.arange(0, WIDTH)[None, :]
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    if OFFSET != 0:
        w += OFFSET
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row_inside = row < rows
    inside = row_inside & (c < C)
    kind = residual_out.dtype.element_ty
    # Every value between is rounded as the unfused ops would store it.
    wide = (
        parts_of(x, place, share, tl.where(row_inside, row, -1), c, inside, K, X_STRIDE)
        .to(kind)
        .to(tl.float32)
    )
    row = row.to(tl.int64)
    wide += tl.load(residual + row * RESIDUAL_STRIDE + c, mask=inside, other=0.0).to(tl.float32)
    total = wide.to(kind)
    tl.store(residual_out + row * OUT_STRIDE + c, total, mask=inside)
    wide = total.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / C + EPS)
    normal = (wide * root * w).to(kind)
    if y is not None:
        tl.store(y + row * Y_STRIDE + c, normal, mask=inside)
    else:
        store_quantized(
            normal.to(tl.float32), q, scale, row, c, 0, inside, row_inside,
            C, GROUP, Y_STRIDE, SCALE_STRIDE, ROWS, WIDTH,
        )  # fmt: skip


@cuda_kernel(combine, "rows", invariant=True)
def combine_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`combine_rows`."""
    tokens, width = call.dims["T"], call.dims["C"]
    # Few tokens are cut finely, so that all their rows are asked for at once by many multiprocessors.
    few = call.invariant or tokens * -(-width // 1024) < call.multiprocessors
    tile = min(power_of_two(width), 256 if few else 1024)
    pdl = "pdl" in call.features
    launch = DeviceLaunch(
        function="makeready.kernels.moe.combine_triton:combine_rows",
        constants={
            "C": width,
            "K": call.dims["k"],
            "X_STRIDE": call.tensors["x"].row_stride,
            "OUT_STRIDE": call.tensors["sum"].row_stride,
            "WIDTH": tile,
            "PDL": pdl,
        },
        arguments={
            **{name: Pointer(name) for name in ("x", "place", "share")},
            "out": Pointer("sum"),
        },
        grid=(tokens * -(-width // tile), 1, 1),
        num_warps=max(1, tile // 256),
        dependent=pdl,
    )
    return (Candidate(f"{tile}", (launch,)),)


def _normalised(call: OpCall) -> Sequence[Candidate]:
    tensors, width, tokens = call.tensors, call.dims["C"], call.dims["T"]
    tiles = row_tiles(
        tokens, width, multiprocessors=call.multiprocessors, invariant=call.invariant, whole_rows=True
    )
    pdl, out = "pdl" in call.features, "q" if "q" in tensors else "y"
    absent = ("y",) if out == "q" else ("q", "scale")
    names = {"x", "place", "share", "residual", "weight", "y", "q", "scale", "residual_out"} - set(absent)
    launch = DeviceLaunch(
        function="makeready.kernels.moe.combine_triton:combine_normalise",
        constants={
            "EPS": call.attrs["eps"],
            "OFFSET": call.attrs["offset"],
            "C": width,
            "K": call.dims["k"],
            "GROUP": call.attrs.get("group", 0),
            "X_STRIDE": tensors["x"].row_stride,
            "RESIDUAL_STRIDE": tensors["residual"].row_stride,
            "OUT_STRIDE": tensors["residual_out"].row_stride,
            "Y_STRIDE": tensors[out].row_stride,
            "SCALE_STRIDE": tensors["scale"].row_stride if out == "q" else 0,
            "ROWS": tiles.rows,
            "WIDTH": tiles.width,
            "PDL": pdl,
            **dict.fromkeys(absent),
        },
        arguments={
            **{name: Pointer(name) for name in sorted(names)},
            "rows": Scalar(tokens, "int32", specialize=False),
        },
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(combine_add_rms_norm, "registers", invariant=True)
def combine_add_rms_norm_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`combine_normalise`."""
    return _normalised(call)


@cuda_kernel(
    combine_add_rms_norm_quantize_fp8,
    "registers",
    features=("fp8",),
    applies=lambda call: groups_fit(call, call.dims["C"]),
    invariant=True,
)
def combine_add_rms_norm_quantize_fp8_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`combine_normalise`."""
    return _normalised(call)


@cuda_kernel(
    combine_add_rms_norm_quantize_int8,
    "registers",
    applies=lambda call: groups_fit(call, call.dims["C"]),
    invariant=True,
)
def combine_add_rms_norm_quantize_int8_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`combine_normalise`."""
    return _normalised(call)
