"""Projections with packed weights (integers, 4-bit floats) on the GPU: from a call to launches.

``linear_int_stream``, beside this file, takes any call; the persistent one those whose operands TMA can address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from makeready.kernels import mx
from makeready.kernels.contract import Contract
from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
)
from makeready.kernels.gemm.linear_int import linear_int
from makeready.kernels.gemm.linear_int_tiling import PERSISTENT, SPAN, Product, Tiling, seconds, tilings
from makeready.kernels.gemm.linear_mx import linear_mx
from makeready.kernels.gemm.ways import addressable, best_of_each
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

assert isinstance(linear_int, Contract)
assert isinstance(linear_mx, Contract)

_OPTIONAL = ("weight_zero", "weight_global_scale", "bias")
_WAVE_ROWS = 4096  # of tokens whose tiles blocks go through before they move on, as in linear_triton.py


def takes(call: OpCall) -> bool:
    """Whether kernels take the call: 16-bit activations, whose weights' groups lie in spans or hold whole ones. Where
    there are offsets groups lie in spans.
    """
    group, inputs = call.attrs["group"], int(call.tensors["x"].shape[1])
    whole = (group >= inputs or group % SPAN == 0) and not offsets(call)
    return sixteen_bits(call) and (whole or group in (16, 32, 64))


def offsets(call: OpCall) -> bool:
    """Whether offsets are in the place of zeros."""
    return "weight_zero" in call.tensors and call.tensors["weight_zero"].dtype != "uint8"


def sixteen_bits(call: OpCall) -> bool:
    """Whether activations are 16-bit floats."""
    return call.tensors["x"].dtype in ("bfloat16", "float16")


def zero_bytes(call: OpCall) -> int:
    """Of a group's zero or offset; 0 where weights are symmetric."""
    return DTYPE_BYTES[call.tensors["weight_zero"].dtype] if "weight_zero" in call.tensors else 0


def form_of(call: OpCall) -> tuple[int, int, bool]:
    """Bits of a weight, inputs that share an element of scales, and whether they are 4-bit floats."""
    if "bits" in call.attrs:
        return call.attrs["bits"], group_of(call), False
    return mx.BITS, mx.BLOCK, True


def group_of(call: OpCall) -> int:
    """Inputs of a group as kernels take it: whole rows are a multiple of a span, unless there are offsets."""
    group, inputs = call.attrs["group"], int(call.tensors["x"].shape[1])
    return -(-inputs // SPAN) * SPAN if group >= inputs and not offsets(call) else group


@cuda_kernel(linear_int, "tiled", applies=takes, invariant=True)
def linear_int_cuda(call: OpCall) -> Sequence[Candidate]:
    """The best few ways by the cost model of ``linear_int_tiling``, the cheapest first.

    All ways where one of them is to serve every batch shape.
    """
    return _best(call)


@cuda_kernel(linear_mx, "tiled", applies=sixteen_bits, invariant=True)
def linear_mx_cuda(call: OpCall) -> Sequence[Candidate]:
    """The same with MXFP4 and NVFP4."""
    return _best(call)


def _best(call: OpCall) -> list[Candidate]:
    if call.invariant:
        return candidates(call)
    product = describe(call)

    def kind(way: Tiling) -> tuple[str, int, int, bool]:
        return way.kind, way.t, way.n, way.sharers(product) > 1

    return [emit(call, way, product) for way in best_of_each(tilings(product), kind)]


def candidates(call: OpCall) -> list[Candidate]:
    """Every way to run ``call``, the cheapest first."""
    product = describe(call)
    return [emit(call, way, product) for way in tilings(product)]


def emit(call: OpCall, way: Tiling, product: Product) -> Candidate:
    """The launch of ``call`` cut in this ``way``."""
    made = _persistent(call, way, product) if way.kind == PERSISTENT else _stream(call, way, product)
    return replace(made, seconds=seconds(product, way))


def describe(call: OpCall) -> Product:
    """What tiling needs to know of the call."""
    x, weight, y = call.tensors["x"], call.tensors["weight"], call.tensors["y"]
    tma = "tma" in call.features
    bits, group, floats = form_of(call)
    return Product(
        T=call.dims["T"],
        N=call.dims["N"],
        K=call.dims["K"],
        bits=bits,
        group=group,
        scale_bytes=DTYPE_BYTES[call.tensors["weight_scale"].dtype],
        floats=floats,
        zero_bytes=zero_bytes(call),
        out_bytes=DTYPE_BYTES[y.dtype],
        tma=tma and addressable(x) and addressable(weight),
        tma_out=tma and addressable(y),
        wgmma="wgmma" in call.features,
        invariant=call.invariant,
        multiprocessors=call.multiprocessors,
        bandwidth=call.bandwidth,
        rate=call.flops[x.dtype],
        shared_bytes=call.shared_bytes,
    )


def _stream(call: OpCall, way: Tiling, product: Product) -> Candidate:
    dependent = "pdl" in call.features
    constants = _constants(call, way) | {
        # Bulk prefetch wants 16-byte aligned rows and lengths, as tensor maps do.
        "AHEAD": way.stages * 8 * product.bits if dependent and product.tma else 0,
        "TMA": product.tma,
    }
    arguments: dict[str, Argument] = {
        "x": _tile(call, "x", way.t, SPAN) if product.tma else Pointer("x"),
        "weight": _tile(call, "weight", way.n, 8 * product.bits) if product.tma else Pointer("weight"),
        "weight_start": Pointer("weight"),
        "share": Scalar(way.share, "int32", specialize=False),
        "x_stride": Scalar(call.tensors["x"].row_stride, "int32"),
        "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
        **_common(call, "y"),
    }
    counters = sums = 0
    if way.sharers(product) > 1:
        counters = -(-4 * way.tiles(product) // 256) * 256
        sums = 4 * way.blocks(product) * 2 * way.t * way.n
        arguments |= {"partial": Scratch(counters, "float32"), "arrived": Scratch(0, "int32")}
    else:
        constants |= {"partial": None, "arrived": None}
    launch = DeviceLaunch(
        function="makeready.kernels.gemm.linear_int_stream_triton:linear_int_stream",
        constants=constants,
        arguments=arguments,
        grid=(way.blocks(product), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
    )
    return Candidate(way.name, (launch,), scratch=counters + sums, zeroed=counters)


def _persistent(call: OpCall, way: Tiling, product: Product) -> Candidate:
    y = call.tensors["y"]
    launch = DeviceLaunch(
        function="makeready.kernels.gemm.linear_int_persistent_triton:linear_int_persistent",
        constants=_constants(call, way) | {"TILES": _WAVE_ROWS // way.t},
        arguments={
            "x": _tile(call, "x", way.t, SPAN),
            "weight": _tile(call, "weight", way.n, 8 * product.bits),
            "y": Descriptor("y", y.shape, (y.row_stride, 1), (way.t, way.n)),
            **_common(call),
        },
        grid=(way.blocks(product), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent="pdl" in call.features,
    )
    return Candidate(way.name, (launch,))


def _constants(call: OpCall, way: Tiling) -> dict[str, Any]:
    """Parameters that both kernels are compiled for."""
    absent = {name: None for name in _OPTIONAL if name not in call.tensors}
    bits, group, floats = form_of(call)
    sizes = {"MX": floats, "BITS": bits, "GROUP": group, "BT": way.t, "BN": way.n}
    return {**sizes, "PDL": "pdl" in call.features, **absent}


def _common(call: OpCall, *pointers: str) -> dict[str, Argument]:
    """Scales, zeros, bias, sizes, and other operands as pointers."""
    named = ("weight_scale", *pointers, *(n for n in _OPTIONAL if n in call.tensors))
    return {
        **{name: Pointer(name) for name in named},
        "T": Scalar(call.dims["T"], "int32", specialize=False),
        "N": Scalar(call.dims["N"], "int32"),
        "K": Scalar(call.dims["K"], "int32"),
    }


def _tile(call: OpCall, operand: str, rows: int, columns: int) -> Argument:
    """Blocks of a matrix; full ones where rows beyond the last may be read: the GPU is slow at making zeros
    (see linear_triton.py).
    """
    tensor = call.tensors[operand]
    height, width = tensor.shape
    if tensor.spare:
        height = -(-int(height) // rows) * rows
    return Descriptor(operand, (height, width), (tensor.row_stride, 1), (rows, columns))
