"""Products of tokens with their experts' weights on the GPU: from a call to launches of grouped_tiles_triton.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.moe.experts import (
    grouped_linear,
    grouped_linear_fp8,
    grouped_linear_fp8_block,
    grouped_linear_int8,
)
from makeready.kernels.moe.experts_silu import (
    grouped_silu_mul,
    grouped_silu_mul_fp8,
    grouped_silu_mul_fp8_block,
    grouped_silu_mul_int8,
)
from makeready.kernels.moe.experts_swiglu import grouped_clamped_swiglu
from makeready.kernels.moe.grouped_tiling import Tiling, seconds, tilings
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

_SQUARE = 128  # side of a square of weights that shares a scale
_A_MULTIPROCESSOR = 2  # blocks


def _dense_scales(call: OpCall) -> bool:
    """Scales are read as if no row of them were padded."""
    scale = call.tensors["x_scale"]
    return call.dims.get("block", _SQUARE) == _SQUARE and scale.row_stride == int(scale.shape[1])


def _by_squares(call: OpCall) -> bool:
    """Groups are of 128 inputs."""
    return _dense_scales(call) and call.dims["K"] % _SQUARE == 0


@cuda_kernel(grouped_linear, "tiles", invariant=True)
def grouped_linear_tiles(call: OpCall) -> Sequence[Candidate]:
    """The best few ways by the model of grouped_tiling.py, the cheapest first."""
    return _best(call, None)


@cuda_kernel(grouped_linear_fp8, "tiles", features=("fp8",), applies=_dense_scales, invariant=True)
def grouped_linear_fp8_tiles(call: OpCall) -> Sequence[Candidate]:
    """The same with scales by channel."""
    return _best(call, "channel")


@cuda_kernel(grouped_linear_int8, "tiles", applies=_dense_scales, invariant=True)
def grouped_linear_int8_tiles(call: OpCall) -> Sequence[Candidate]:
    """The same of integers."""
    return _best(call, "channel")


@cuda_kernel(grouped_linear_fp8_block, "tiles", features=("fp8",), applies=_by_squares, invariant=True)
def grouped_linear_fp8_block_tiles(call: OpCall) -> Sequence[Candidate]:
    """The same with scales by squares of 128."""
    return _best(call, "block")


@cuda_kernel(grouped_silu_mul, "tiles", invariant=True)
def grouped_silu_mul_tiles(call: OpCall) -> Sequence[Candidate]:
    """Tiles of a gate and what it multiplies."""
    return _best(call, None)


@cuda_kernel(grouped_clamped_swiglu, "tiles", invariant=True)
def grouped_clamped_swiglu_tiles(call: OpCall) -> Sequence[Candidate]:
    """Tiles of a gate and what it multiplies."""
    return _best(call, None)


@cuda_kernel(grouped_silu_mul_fp8, "tiles", features=("fp8",), applies=_dense_scales, invariant=True)
def grouped_silu_mul_fp8_tiles(call: OpCall) -> Sequence[Candidate]:
    """The same with scales by channel."""
    return _best(call, "channel")


@cuda_kernel(grouped_silu_mul_int8, "tiles", applies=_dense_scales, invariant=True)
def grouped_silu_mul_int8_tiles(call: OpCall) -> Sequence[Candidate]:
    """The same of integers."""
    return _best(call, "channel")


@cuda_kernel(grouped_silu_mul_fp8_block, "tiles", features=("fp8",), applies=_by_squares, invariant=True)
def grouped_silu_mul_fp8_block_tiles(call: OpCall) -> Sequence[Candidate]:
    """The same with scales by squares of 128."""
    return _best(call, "block")


def _best(call: OpCall, scales: str | None) -> list[Candidate]:
    """The ways that differ in more than pipeline depth; all where one of them is to serve every batch shape."""
    ways = candidates(call, scales)
    if call.invariant:
        return ways
    distinct: dict[str, Candidate] = {}
    for way in ways:
        distinct.setdefault(way.name.rpartition("_")[0], way)
    return list(distinct.values())


def candidates(call: OpCall, scales: str | None) -> list[Candidate]:
    """Every way to run ``call``, the cheapest first.

    Args:
        scales: None, "channel" or "block".
    """
    x, weight = call.tensors["x"], call.tensors["weight"]
    narrow = x.dtype == weight.dtype and DTYPE_BYTES[x.dtype] <= 2
    apart = scales == "block" or weight.dtype == "float8_e4m3fn"
    return [emit(call, way, scales) for way in tilings(call, narrow=narrow, apart=apart)]


def gate_constants(call: OpCall) -> dict[str, Any]:
    """Which gate the call has behind its product, and its numbers."""
    gate = None
    if int(call.tensors["y"].shape[1]) != int(call.tensors["weight"].shape[1]):
        gate = "clamped_swiglu" if "limit" in call.attrs else "silu_mul"
    return {"GATE": gate, "ALPHA": call.attrs.get("alpha", 0.0), "LIMIT": call.attrs.get("limit", 0.0)}


def emit(call: OpCall, way: Tiling, scales: str | None) -> Candidate:
    """The launch of ``call`` cut in this ``way``."""
    x, y = call.tensors["x"], call.tensors["y"]
    experts, entries, top_k = call.dims["E"], call.dims["M"], call.attrs["top_k"]
    outputs = int(y.shape[1])
    dependent = "pdl" in call.features
    names = ["x", "weight", "start", "y", *(("order",) if top_k else ())]
    names += ["x_scale", "weight_scale"] if scales else []
    names += ["bias"] if "bias" in call.tensors else []
    arguments: dict[str, Argument] = {name: Pointer(name) for name in names}
    arguments |= {
        "M": Scalar(entries, "int32", specialize=False),
        "N": Scalar(outputs, "int32"),
        "K": Scalar(call.dims["K"], "int32"),
        "x_stride": Scalar(x.row_stride, "int32"),
        "y_stride": Scalar(y.row_stride, "int32"),
    }
    constants: dict[str, Any] = {
        "E": experts,
        "EP": power_of_two(experts),
        "TOP_K": top_k,
        "BT": way.t,
        "BN": way.n,
        "BK": way.k,
        **gate_constants(call),
        "WIDEN": x.dtype != call.tensors["weight"].dtype or x.dtype == "float32",
        "SCALES": scales,
        "PDL": dependent,
        **({} if top_k else {"order": None}),
        **({} if "bias" in call.tensors else {"bias": None}),
        **({} if scales else {"x_scale": None, "weight_scale": None}),
    }
    tiles = -(-entries // way.t) + min(entries, experts)
    launch = DeviceLaunch(
        function="makeready.kernels.moe.grouped_tiles_triton:grouped_tiles",
        constants=constants,
        arguments=arguments,
        grid=(min(tiles * -(-outputs // way.n), _A_MULTIPROCESSOR * call.multiprocessors), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
    )
    return Candidate(way.name, (launch,), seconds=seconds(call, way))
