"""Dense projection on the GPU: from a call to launches of the two kernels beside this file.

``linear_stream`` takes any call; ``linear_persistent`` those whose operands TMA can address. Sizes are
arguments and only tile sides are compiled in, so a handful of kernels serves every matrix of a model in
every bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
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
    Tensor,
)
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_tiling import PERSISTENT, Product, Tiling, tilings
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

assert isinstance(linear, Contract)

_BEST = 3
_GROUP = 8  # tiles along the tokens that share a wave's weights; 8 x 128 rows of K = 4096 are 8 MB of L2


@cuda_kernel(linear, "tiled")
def linear_cuda(call: OpCall) -> Sequence[Candidate]:
    """The best few ways to run ``linear``, best first by the cost model of ``linear_tiling``.

    They differ in more than pipeline depth, so that one of them is right where the model is not.
    """
    product = describe(call)
    distinct: dict[tuple[str, int, int, int], Tiling] = {}
    for way in tilings(product):
        distinct.setdefault((way.kind, way.t, way.n, way.split), way)
    return [emit(call, way, product) for way in islice(distinct.values(), _BEST)]


def candidates(call: OpCall) -> list[Candidate]:
    """Every way to run ``linear``, the cheapest first."""
    product = describe(call)
    return [emit(call, way, product) for way in tilings(product)]


def emit(call: OpCall, way: Tiling, product: Product) -> Candidate:
    """The launch of ``call`` cut in this ``way``."""
    return _persistent(call, way, product) if way.kind == PERSISTENT else _stream(call, way, product)


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


def _stream(call: OpCall, way: Tiling, product: Product) -> Candidate:
    dependent = "pdl" in call.features
    constants: dict[str, Any] = {
        "BT": way.t,
        "BN": way.n,
        "BK": way.k,
        "SPLIT": way.split,
        # Bulk prefetch wants 16-byte aligned rows and lengths, as tensor maps do.
        "AHEAD": way.stages * way.k * 2 if dependent and product.tma else 0,
        "TMA": product.tma,
        "WIDEN": not product.tensor_cores,
        "PDL": dependent,
    }
    arguments: dict[str, Argument] = {
        "x": _tile(call, "x", way.t, way.k) if product.tma else Pointer("x"),
        "weight": _tile(call, "weight", way.n, way.k) if product.tma else Pointer("weight"),
        "weight_start": Pointer("weight"),
        "y": Pointer("y"),
        "T": Scalar(product.T, "int32", specialize=False),
        "N": Scalar(product.N, "int32"),
        "K": Scalar(product.K, "int32"),
        "x_stride": Scalar(call.tensors["x"].row_stride, "int32"),
        "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
    }
    counters = sums = 0
    if way.split > 1:
        tiles = way.tiles(product)
        counters = -(-4 * tiles // 256) * 256
        sums = 4 * tiles * way.split * way.t * way.n
        arguments |= {"partial": Scratch(counters, "float32"), "arrived": Scratch(0, "int32")}
    else:
        constants |= {"partial": None, "arrived": None}
    launch = DeviceLaunch(
        function="makeready.kernels.gemm.linear_stream_triton:linear_stream",
        constants={**constants, **_absent_bias(call)},
        arguments={**arguments, **_bias(call)},
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
            "PDL": dependent,
            **_absent_bias(call),
        },
        arguments={
            "x": _tile(call, "x", way.t, way.k),
            "weight": _tile(call, "weight", way.n, way.k),
            "y": _tile(call, "y", way.t, way.n // way.halves),
            "T": Scalar(product.T, "int32", specialize=False),
            "N": Scalar(product.N, "int32"),
            "K": Scalar(product.K, "int32"),
            **_bias(call),
        },
        grid=(way.blocks(product), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
    )
    return Candidate(way.name, (launch,))


def _bias(call: OpCall) -> dict[str, Argument]:
    return {"bias": Pointer("bias")} if "bias" in call.tensors else {}


def _absent_bias(call: OpCall) -> dict[str, None]:
    return {} if "bias" in call.tensors else {"bias": None}


def _tile(call: OpCall, operand: str, rows: int, columns: int) -> Argument:
    tensor = call.tensors[operand]
    return Descriptor(operand, tensor.shape, (tensor.row_stride, 1), (rows, columns))
