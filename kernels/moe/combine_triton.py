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
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer
from makeready.kernels.moe.route import combine
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two

assert isinstance(combine, Contract)


@triton.jit
def combine_rows(
    y,
    place,
    weight,
    out,
    C: tl.constexpr,
    K: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out[t] = sum over i of weight[t, i] * y[place[t, i]]`` in the order of i; a tile of one row a block."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    columns: tl.constexpr = (C + WIDTH - 1) // WIDTH
    t = tl.program_id(0) // columns
    c = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for i in tl.static_range(K):
        at = tl.load(place + t * K + i)
        share = tl.load(weight + t * K + i)
        part = tl.load(y + at.to(tl.int64) * Y_STRIDE + c, mask=(c < C) & (at >= 0), other=0.0)
        total += tl.where(at >= 0, part.to(tl.float32) * share, 0.0)
    tl.store(out + t.to(tl.int64) * OUT_STRIDE + c, total.to(out.dtype.element_ty), mask=c < C)


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
            "Y_STRIDE": call.tensors["y"].row_stride,
            "OUT_STRIDE": call.tensors["sum"].row_stride,
            "WIDTH": tile,
            "PDL": pdl,
        },
        arguments={
            **{name: Pointer(name) for name in ("y", "place", "weight")},
            "out": Pointer("sum"),
        },
        grid=(tokens * -(-width // tile), 1, 1),
        num_warps=max(1, tile // 256),
        dependent=pdl,
    )
    return (Candidate(f"{tile}", (launch,)),)
