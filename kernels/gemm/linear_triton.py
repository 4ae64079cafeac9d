"""Dense projection on the GPU: from a call to launches of the two kernels beside this file.

``linear_stream`` takes any call; ``linear_persistent`` those whose operands TMA can address. Sizes are
arguments and only tile sides are compiled in, so a handful of kernels serves every matrix of a model in
every bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
    Tensor,
)
from makeready.kernels.gemm.linear_tiling import PERSISTENT, Product, Tiling, tilings
from makeready.kernels.spec import DTYPE_BYTES

_BEST = 3
_GROUP = 8  # tiles along the tokens that share a wave's weights; 8 x 128 rows of K = 4096 are 8 MB of L2


def linear_cuda(call: OpCall) -> tuple[Candidate, ...]:
    """The best few ways to run ``linear``, best first by the cost model of ``linear_tiling``."""
    return candidates(call)[:_BEST]


def candidates(call: OpCall) -> tuple[Candidate, ...]:
    """Every way to run ``linear``, the cheapest first."""
    product = describe(call)
    ways: Sequence[Tiling] = tilings(product)
    return tuple(
        _persistent(call, way, product) if way.kind == PERSISTENT else _stream(call, way, product)
        for way in ways
    )


def describe(call: OpCall) -> Product:
    """What tiling needs to know of the call."""
    x, weight, y = call.tensors["x"], call.tensors["weight"], call.tensors["y"]
    tensor_cores = x.dtype == weight.dtype and DTYPE_BYTES[x.dtype] == 2
    tma = "tma" in call.features
    return Product(
        T=call.dims["T"],
        N=call.dims["N"],
        K=call.dims["K"],
        out_bytes=DTYPE_BYTES[y.dtype],
        tma=tma and tensor_cores and _addressable(x) and _addressable(weight),
        tma_out=tma and _addressable(y),
        tensor_cores=tensor_cores,
        multiprocessors=call.multiprocessors,
        shared_bytes=call.shared_bytes,
    )


def _addressable(tensor: Tensor) -> bool:
    """Whether a tensor map can describe it: address and row stride are multiples of 16 bytes."""
    return tensor.alignment % 16 == 0 and tensor.row_stride * DTYPE_BYTES[tensor.dtype] % 16 == 0


def _unit(call: OpCall) -> int:
    """Largest of 8, 4, 2, 1 elements that N, K and the row strides are multiples of."""
    strides = (call.tensors["x"].row_stride, call.tensors["y"].row_stride)
    return math.gcd(8, call.dims["N"], call.dims["K"], *strides)


def _stream(call: OpCall, way: Tiling, product: Product) -> Candidate:
    tiles = way.tiles(product)
    dependent = "pdl" in call.features
    counters = 0 if way.split == 1 else -(-4 * tiles // 256) * 256
    sums = 0 if way.split == 1 else 4 * tiles * way.split * way.t * way.n
    unused = Pointer("y")
    # Bulk prefetch wants 16-byte aligned rows and lengths, as tensor maps do.
    ahead = way.stages * way.k * 2 if dependent and product.tma else 0
    launch = DeviceLaunch(
        function="makeready.kernels.gemm.linear_stream_triton:linear_stream",
        constants={
            "BT": way.t,
            "BN": way.n,
            "BK": way.k,
            "SPLIT": way.split,
            "AHEAD": ahead,
            "UNIT": _unit(call),
            "BIAS": "bias" in call.tensors,
            "TMA": product.tma,
            "WIDEN": not product.tensor_cores,
            "PDL": dependent,
        },
        arguments={
            "x": _tile(call, "x", way.t, way.k) if product.tma else Pointer("x"),
            "weight": _tile(call, "weight", way.n, way.k) if product.tma else Pointer("weight"),
            "weight_start": Pointer("weight"),
            "bias": Pointer("bias") if "bias" in call.tensors else unused,
            "y": Pointer("y"),
            "partial": Scratch(counters, "float32") if sums else unused,
            "arrived": Scratch(0, "int32") if sums else unused,
            "T": Scalar(product.T, "int32"),
            "N": Scalar(product.N, "int32"),
            "K": Scalar(product.K, "int32"),
            "x_stride": Scalar(call.tensors["x"].row_stride, "int32"),
            "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
        },
        grid=(way.blocks(product), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
    )
    return Candidate(way.name, (launch,), scratch=counters + sums, zeroed=counters)


def _persistent(call: OpCall, way: Tiling, product: Product) -> Candidate:
    dependent = "pdl" in call.features
    launch = DeviceLaunch(
        function="makeready.kernels.gemm.linear_persistent_triton:linear_persistent",
        constants={
            "BT": way.t,
            "BN": way.n,
            "BK": way.k,
            "GROUP": _GROUP,
            "HALVES": way.halves,
            "BIAS": "bias" in call.tensors,
            "PDL": dependent,
        },
        arguments={
            "x": _tile(call, "x", way.t, way.k),
            "weight": _tile(call, "weight", way.n, way.k),
            "bias": Pointer("bias" if "bias" in call.tensors else "y"),
            "y": _tile(call, "y", way.t, way.n // way.halves),
            "T": Scalar(product.T, "int32"),
            "N": Scalar(product.N, "int32"),
            "K": Scalar(product.K, "int32"),
        },
        grid=(way.blocks(product), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
    )
    return Candidate(way.name, (launch,))


def _tile(call: OpCall, operand: str, rows: int, columns: int) -> Argument:
    tensor = call.tensors[operand]
    return Descriptor(operand, tensor.shape, (tensor.row_stride, 1), (rows, columns))
