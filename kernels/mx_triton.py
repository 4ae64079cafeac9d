"""MXFP4 made of wide weights, 4-bit floats made wide again, on the GPU while weights are loaded; see kernels/mx.py.

A block of threads has the words of one span of 64 outputs, whose fields are 32 inputs.

# N outputs, K inputs
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
from makeready.kernels.mx import dequantize_mx, quantize_mx
from makeready.kernels.mx_values_triton import e4m3_of, power_of
from makeready.kernels.registry import cuda_kernel


@triton.jit
def nearest_number(v):
    """Numbers of 4 bits nearest to magnitudes, ties to the even code, those beyond 6 that of 6: int32."""
    q = (v > 0.25).to(tl.int32) + (v > 1.25).to(tl.int32) + (v > 2.5).to(tl.int32) + (v > 5.0).to(tl.int32)
    return q + (v >= 0.75).to(tl.int32) + (v >= 1.75).to(tl.int32) + (v >= 3.5).to(tl.int32)


@triton.jit
def quantize_blocks(x, weight, scale, N, K: tl.constexpr, X_STRIDE: tl.constexpr, PDL: tl.constexpr):
    """Numbers and scales of one span of 64 outputs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    spans: tl.constexpr = (K + 127) // 128
    blocks: tl.constexpr = (K + 31) // 32
    span, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, 64)
    n, j = tile * 64 + i[:, None], tl.arange(0, 32)[None, :]
    made = tl.zeros((64, 32), tl.int32)
    for field in tl.static_range(4):
        block = 4 * span + field
        k = 32 * block + j
        bits = tl.load(x + n * X_STRIDE + k, mask=(n < N) & (k < K), other=0.0).to(tl.float32)
        bits = bits.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF  # ordered as the magnitudes are, what is not finite behind them
        exponent = tl.max(size, 1) >> 23
        own = tl.where(exponent == 255, 255, tl.maximum(exponent - 2, 0))
        at = (tile * blocks + block) * 64 + i
        tl.store(scale + at, own.to(tl.uint8), mask=block < blocks)
        inverse = (tl.minimum(254 - own, 254) << 23).to(tl.float32, bitcast=True)  # 2^(127 - own)
        v = size.to(tl.float32, bitcast=True) * inverse[:, None]
        q = nearest_number(v)
        q |= (bits >> 28) & 8
        made |= tl.where(own[:, None] == 255, 0, q) << (4 * field)
    tl.store(weight + n * (spans * 32) + span * 32 + j, made.to(tl.int16), mask=n < N)


@triton.jit
def dequantize_blocks(weight, scale, global_scale, x, N, K: tl.constexpr, PDL: tl.constexpr):
    """What one span of 64 outputs stands for; ``global_scale`` None: 1."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    spans: tl.constexpr = (K + 127) // 128
    blocks: tl.constexpr = (K + 31) // 32
    span, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, 64)[:, None]
    n, j = tile * 64 + i, tl.arange(0, 32)[None, :]
    words = tl.load(weight + n * (spans * 32) + span * 32 + j, mask=n < N, other=0).to(tl.int32)
    for field in tl.static_range(4):
        block = 4 * span + field
        k = 32 * block + j
        q = words >> (4 * field)
        exponent = (q >> 1) & 3
        half = (q & 1).to(tl.float32) * 0.5
        size = tl.where(exponent == 0, half, (1.0 + half) * tl.exp2(exponent.to(tl.float32) - 1.0))
        signed = (size.to(tl.int32, bitcast=True) | ((q & 8) << 28)).to(tl.float32, bitcast=True)
        found = tl.load(scale + (tile * blocks + block) * 64 + i, mask=block < blocks, other=0)
        if found.dtype == tl.uint8:
            own = power_of(found.to(tl.int32))
        else:
            own = e4m3_of(tl.where(j < 16, found.to(tl.int32), found.to(tl.int32) >> 8))
        if global_scale is not None:
            own *= tl.load(global_scale + n, mask=n < N, other=0.0)
        wide = signed * own
        tl.store(x + n * K + k, wide.to(x.dtype.element_ty), mask=(n < N) & (k < K))


def _launch(
    call: OpCall, function: str, names: tuple[str, ...], inputs: int, **constants: Any
) -> tuple[Candidate, ...]:
    outputs, dependent = call.dims["N"], "pdl" in call.features
    absent = {name: None for name in names if name not in call.tensors}
    launch = DeviceLaunch(
        function=f"makeready.kernels.mx_triton:{function}",
        constants={"K": inputs, **constants, **absent, "PDL": dependent},
        arguments={
            **{name: Pointer(name) for name in names if name in call.tensors},
            "N": Scalar(outputs, "int32", specialize=False),
        },
        grid=(-(-inputs // SPAN), -(-outputs // TILE), 1),
        num_warps=4,
        dependent=dependent,
    )
    return (Candidate(function, (launch,)),)


@cuda_kernel(quantize_mx, "blocks", invariant=True)
def quantize_mx_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`quantize_blocks`."""
    stride = call.tensors["x"].row_stride
    return _launch(call, "quantize_blocks", ("x", "weight", "scale"), call.dims["K"], X_STRIDE=stride)


@cuda_kernel(dequantize_mx, "blocks", invariant=True)
def dequantize_mx_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`dequantize_blocks`."""
    return _launch(call, "dequantize_blocks", ("weight", "scale", "global_scale", "x"), call.attrs["inputs"])
