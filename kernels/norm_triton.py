"""Root-mean-square norms on GPUs: one sweep, rows held in registers.

The weights are fetched before the kernel waits for its predecessors, since nothing writes them.

# C features of a row (of a head, in head_rms_norm)
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.norm import add_rms_norm, gated_head_rms_norm, head_rms_norm, rms_norm
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import row_tiles


@triton.jit
def normalise(
    x,
    residual,
    weight,
    y,
    residual_out,
    gate,
    rows,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norms of ``ROWS`` rows a block; row r is head ``r % HEADS`` of token ``r // HEADS``.

    ``residual`` and ``residual_out`` are None where nothing is added, ``gate`` where norms are not gated.
    """
    c = tl.arange(0, WIDTH)[None, :]
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    if OFFSET != 0:
        w += OFFSET
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, column = (row // HEADS).to(tl.int64), (row % HEADS) * C + c
    inside = (row < rows) & (c < C)
    wide = tl.load(x + token * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        wide += tl.load(residual + token * RESIDUAL_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
        total = wide.to(residual_out.dtype.element_ty)
        tl.store(residual_out + token * OUT_STRIDE + column, total, mask=inside)
        wide = total.to(tl.float32)  # the norm is of the sum as it is stored
    scale = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / C + EPS)
    normed = wide * scale * w
    if gate is not None:
        by = tl.load(gate + token * GATE_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
        normed *= by * tl.sigmoid(by)
    tl.store(y + token * Y_STRIDE + column, normed.to(y.dtype.element_ty), mask=inside)


def _launch(call: OpCall, heads: int = 1) -> Sequence[Candidate]:
    tensors = call.tensors
    adds, gated = "residual" in tensors, "gate" in tensors
    features, tokens = tensors["weight"].shape[0], tensors["x"].shape[0]
    assert isinstance(features, int)
    assert isinstance(tokens, int)
    tiles = row_tiles(
        tokens * heads,
        features,
        multiprocessors=call.multiprocessors,
        invariant=call.invariant,
        whole_rows=True,
    )
    pdl = "pdl" in call.features
    constants = {
        "EPS": call.attrs["eps"],
        "OFFSET": call.attrs.get("offset", 0.0),
        "HEADS": heads,
        "C": features,
        "X_STRIDE": tensors["x"].row_stride,
        "RESIDUAL_STRIDE": tensors["residual"].row_stride if adds else 0,
        "Y_STRIDE": tensors["y"].row_stride,
        "OUT_STRIDE": tensors["residual_out"].row_stride if adds else 0,
        "GATE_STRIDE": tensors["gate"].row_stride if gated else 0,
        "ROWS": tiles.rows,
        "WIDTH": tiles.width,
        "PDL": pdl,
    }
    present = {"x": True, "residual": adds, "weight": True, "y": True, "residual_out": adds, "gate": gated}
    constants |= {name: None for name, there in present.items() if not there}
    arguments = {name: Pointer(name) for name, there in present.items() if there}
    launch = DeviceLaunch(
        function="makeready.kernels.norm_triton:normalise",
        constants=constants,
        arguments={**arguments, "rows": Scalar(tokens * heads, "int32")},
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
        early=("weight",),
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(rms_norm, "registers", invariant=True)
def rms_norm_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`normalise`."""
    return _launch(call)


@cuda_kernel(add_rms_norm, "registers", invariant=True)
def add_rms_norm_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`normalise`."""
    return _launch(call)


@cuda_kernel(head_rms_norm, "registers", invariant=True)
def head_rms_norm_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`normalise`."""
    return _launch(call, call.attrs["heads"])


@cuda_kernel(gated_head_rms_norm, "registers", invariant=True)
def gated_head_rms_norm_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`normalise`."""
    return _launch(call, call.attrs["heads"])
