"""Projections of 8-bit floats and integers on the GPU: from a call to launches of the kernels beside this file.

``linear_fp8_stream`` takes any call; the persistent ones those whose operands TMA can address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from makeready.kernels.gemm.linear_fp8 import linear_fp8, linear_fp8_block
from makeready.kernels.gemm.linear_fp8_tiling import GROUP, PERSISTENT, Product, Tiling, seconds, tilings
from makeready.kernels.gemm.linear_int8 import MOST_INPUTS, linear_int8
from makeready.kernels.gemm.ways import addressable, best_of_each
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

assert isinstance(linear_fp8, Contract)
assert isinstance(linear_fp8_block, Contract)
assert isinstance(linear_int8, Contract)

_WAVE = 8  # tiles along the tokens that share a wave's weights; 8 x 128 rows of K = 4096 are 4 MB of L2


def _by_rows(call: OpCall) -> bool:
    """Scales are read as if no row of them were padded."""
    return call.tensors["x_scale"].row_stride == 1


def _sums_fit(call: OpCall) -> bool:
    return _by_rows(call) and call.dims["K"] <= MOST_INPUTS


def _by_groups(call: OpCall) -> bool:
    groups = call.dims["K"] // GROUP
    dense = call.tensors["x_scale"].row_stride == call.tensors["weight_scale"].row_stride == groups
    return call.dims["block"] == GROUP and call.dims["K"] % GROUP == 0 and dense


@cuda_kernel(linear_fp8, "tiled", features=("fp8",), applies=_by_rows, invariant=True)
def linear_fp8_cuda(call: OpCall) -> Sequence[Candidate]:
    """The best few ways by the cost model of ``linear_fp8_tiling``, the cheapest first."""
    return _best(call)


@cuda_kernel(linear_int8, "tiled", applies=_sums_fit, invariant=True)
def linear_int8_cuda(call: OpCall) -> Sequence[Candidate]:
    """The best few ways for integers, by the figures of 8-bit floats: the kernels are the same."""
    return _best(call)


@cuda_kernel(linear_fp8_block, "tiled", features=("fp8",), applies=_by_groups, invariant=True)
def linear_fp8_block_cuda(call: OpCall) -> Sequence[Candidate]:
    """The best few ways for groups of 128, the cheapest first."""
    return _best(call)


def _best(call: OpCall) -> list[Candidate]:
    """They differ in more than pipeline depth, so that one of them is right where the model is not.

    All ways where one of them is to serve every batch shape.
    """
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
    return Product(
        T=call.dims["T"],
        N=call.dims["N"],
        K=call.dims["K"],
        out_bytes=DTYPE_BYTES[y.dtype],
        grouped=call.op == linear_fp8_block.name,
        tma=tma and addressable(x) and addressable(weight),
        tma_out=tma and addressable(y),
        invariant=call.invariant,
        multiprocessors=call.multiprocessors,
        bandwidth=call.bandwidth,
        rate=call.flops[weight.dtype],
        shared_bytes=call.shared_bytes,
    )


def _stream(call: OpCall, way: Tiling, product: Product) -> Candidate:
    dependent = "pdl" in call.features
    constants: dict[str, Any] = {
        "BT": way.t,
        "BN": way.n,
        "BK": way.k,
        "GROUPED": product.grouped,
        # Bulk prefetch wants 16-byte aligned rows and lengths, as tensor maps do.
        "AHEAD": way.stages * way.k if dependent and product.tma else 0,
        "TMA": product.tma,
        "PDL": dependent,
    }
    arguments: dict[str, Argument] = {
        "x": _tile(call, "x", way.t, way.k) if product.tma else Pointer("x"),
        "weight": _tile(call, "weight", way.n, way.k) if product.tma else Pointer("weight"),
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
        sums_in = "int32" if call.op == linear_int8.name else "float32"
        arguments |= {"partial": Scratch(counters, sums_in), "arrived": Scratch(0, "int32")}
    else:
        constants |= {"partial": None, "arrived": None}
    launch = DeviceLaunch(
        function="makeready.kernels.gemm.linear_fp8_stream_triton:linear_fp8_stream",
        constants={**constants, **_absent_bias(call)},
        arguments=arguments,
        grid=(way.blocks(product), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
    )
    return Candidate(way.name, (launch,), scratch=counters + sums, zeroed=counters)


def _persistent(call: OpCall, way: Tiling, product: Product) -> Candidate:
    dependent = "pdl" in call.features
    constants: dict[str, Any] = {"BT": way.t, "GROUP": _WAVE, "PDL": dependent}
    width = way.n // way.pieces
    if product.grouped:
        function = "linear_fp8_block_triton:linear_fp8_block_persistent"
        constants |= {"BN": width, "PIECES": way.pieces, "FLATTEN": way.a_sm == 1}
    else:
        function = "linear_fp8_persistent_triton:linear_fp8_persistent"
        constants |= {"BN": width, "BK": way.k, "HALVES": way.halves}
    launch = DeviceLaunch(
        function="makeready.kernels.gemm." + function,
        constants={**constants, **_absent_bias(call)},
        arguments={
            "x": _tile(call, "x", way.t, way.k),
            "weight": _tile(call, "weight", width, way.k),
            "y": _result(call, way.t, width // way.halves),
            **_common(call),
        },
        grid=(way.blocks(product), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
    )
    return Candidate(way.name, (launch,))


def _common(call: OpCall, *pointers: str) -> dict[str, Argument]:
    """Scales, bias, sizes, and other operands as pointers."""
    named = ("x_scale", "weight_scale", *pointers, *(("bias",) if "bias" in call.tensors else ()))
    return {
        **{name: Pointer(name) for name in named},
        "T": Scalar(call.dims["T"], "int32", specialize=False),
        "N": Scalar(call.dims["N"], "int32"),
        "K": Scalar(call.dims["K"], "int32"),
    }


def _absent_bias(call: OpCall) -> dict[str, None]:
    return {} if "bias" in call.tensors else {"bias": None}


def _result(call: OpCall, rows: int, columns: int) -> Argument:
    tensor = call.tensors["y"]
    return Descriptor("y", tensor.shape, (tensor.row_stride, 1), (rows, columns))


def _tile(call: OpCall, operand: str, rows: int, columns: int) -> Argument:
    """Blocks of a matrix; full ones where rows beyond the last may be read: the GPU is slow at making zeros
    (see linear_triton.py).
    """
    tensor = call.tensors[operand]
    height, width = tensor.shape
    if tensor.spare:
        height = -(-int(height) // rows) * rows
    return Descriptor(operand, (height, width), (tensor.row_stride, 1), (rows, columns))
