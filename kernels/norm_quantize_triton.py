"""Root-mean-square norms that leave 8-bit floats or integers and scales: one sweep, rows held in registers.

# C features of a row
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
from makeready.kernels.quantize import (
    add_rms_norm_and_quantize_fp8,
    add_rms_norm_quantize_fp8,
    rms_norm_quantize_fp8,
)
from makeready.kernels.quantize_int8 import (
    add_rms_norm_and_quantize_int8,
    add_rms_norm_quantize_int8,
    rms_norm_quantize_int8,
)
from makeready.kernels.quantize_triton import groups_fit, store_quantized
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import row_tiles


@triton.jit
def normalise_quantize(
    x,
    residual,
    weight,
    q,
    scale,
    y,
    residual_out,
    rows,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norms of ``ROWS`` rows a block, quantized by groups of ``GROUP`` features.

    ``residual`` and ``residual_out`` are None where nothing is added, ``y`` where nobody reads the norm itself.
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
    row = row.to(tl.int64)
    wide = tl.load(x + row * X_STRIDE + c, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        wide += tl.load(residual + row * RESIDUAL_STRIDE + c, mask=inside, other=0.0).to(tl.float32)
        total = wide.to(residual_out.dtype.element_ty)
        tl.store(residual_out + row * OUT_STRIDE + c, total, mask=inside)
        wide = total.to(tl.float32)  # the norm is of the sum as it is stored
    root = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / C + EPS)
    # Rounded as the unfused norm would store it.
    normal = (wide * root * w).to(x.dtype.element_ty)
    if y is not None:
        tl.store(y + row * Y_STRIDE + c, normal, mask=inside)
    wide = normal.to(tl.float32)
    store_quantized(
        wide, q, scale, row, c, 0, inside, row_inside, C, GROUP, Q_STRIDE, SCALE_STRIDE, ROWS, WIDTH
    )


def _fits(call: OpCall) -> bool:
    return groups_fit(call, call.dims["C"])


def _launch(call: OpCall) -> Sequence[Candidate]:
    tensors = call.tensors
    adds, keeps = "residual" in tensors, "y" in tensors
    features, tokens = call.dims["C"], call.dims["T"]
    tiles = row_tiles(
        tokens, features, multiprocessors=call.multiprocessors, invariant=call.invariant, whole_rows=True
    )
    pdl = "pdl" in call.features
    constants = {
        "EPS": call.attrs["eps"],
        "OFFSET": call.attrs["offset"],
        "C": features,
        "GROUP": call.attrs["group"],
        "X_STRIDE": tensors["x"].row_stride,
        "RESIDUAL_STRIDE": tensors["residual"].row_stride if adds else 0,
        "Q_STRIDE": tensors["q"].row_stride,
        "SCALE_STRIDE": tensors["scale"].row_stride,
        "Y_STRIDE": tensors["y"].row_stride if keeps else 0,
        "OUT_STRIDE": tensors["residual_out"].row_stride if adds else 0,
        "ROWS": tiles.rows,
        "WIDTH": tiles.width,
        "PDL": pdl,
    }
    names = ["x", "weight", "q", "scale"]
    if adds:
        names += ["residual", "residual_out"]
    else:
        constants |= {"residual": None, "residual_out": None}
    if keeps:
        names.append("y")
    else:
        constants["y"] = None
    launch = DeviceLaunch(
        function="makeready.kernels.norm_quantize_triton:normalise_quantize",
        constants=constants,
        arguments={
            **{name: Pointer(name) for name in names},
            "rows": Scalar(tokens, "int32", specialize=False),
        },
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
        early=("weight",),
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


def _register(op: Contract, features: Sequence[str]) -> None:
    @cuda_kernel(op, "registers", features=features, applies=_fits, invariant=True)
    def launches(call: OpCall) -> Sequence[Candidate]:
        """See :func:`normalise_quantize`."""
        return _launch(call)


for _op in (rms_norm_quantize_fp8, add_rms_norm_quantize_fp8, add_rms_norm_and_quantize_fp8):
    _register(_op, ("fp8",))
for _op in (rms_norm_quantize_int8, add_rms_norm_quantize_int8, add_rms_norm_and_quantize_int8):
    _register(_op, ())
