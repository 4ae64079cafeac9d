"""Products with experts' weights of few bits on the GPU: from a call to launches of grouped_packed_triton.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from makeready.kernels.contract import Contract
from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.gemm.linear_int_tiling import SPAN
from makeready.kernels.gemm.linear_int_triton import form_of, sixteen_bits, takes, zero_bytes
from makeready.kernels.moe.experts_int import grouped_linear_int, grouped_silu_mul_int
from makeready.kernels.moe.experts_mx import (
    grouped_clamped_swiglu_mx,
    grouped_linear_mx,
    grouped_silu_mul_mx,
)
from makeready.kernels.moe.experts_triton import gate_constants
from makeready.kernels.moe.grouped_tiling import Grouped, Tiling, describe, mismatched, predicted
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

assert isinstance(grouped_linear_int, Contract)
assert isinstance(grouped_silu_mul_int, Contract)

_OPTIONAL = ("weight_zero", "weight_global_scale", "bias")
_A_MULTIPROCESSOR = 2  # blocks
# Of the bandwidth, where few tokens stream the weights: widening them holds blocks up. With gpt-oss-20b's MXFP4 on an
# H200 steps of 1, 16 and 64 rows took as if experts were 3.6, 2.6 and 2.6 times as slow as at a share of 0.6; with
# one row there are not tiles for all blocks.
_MEMORY = 0.23
# Tokens, outputs and warps of a tile, and whether it may hold a gate as well: from cross-compiled kernels.
_SIDES = (
    (16, 64, 4, True), (16, 128, 4, False), (32, 64, 4, True), (64, 64, 4, True), (64, 128, 8, True),
    (128, 64, 4, False), (128, 128, 8, False),
)  # fmt: skip


@cuda_kernel(grouped_linear_int, "tiles", applies=takes, invariant=True)
def grouped_linear_int_tiles(call: OpCall) -> Sequence[Candidate]:
    """The best few ways by the model of grouped_tiling.py, the cheapest first."""
    return _best(call)


@cuda_kernel(grouped_silu_mul_int, "tiles", applies=takes, invariant=True)
def grouped_silu_mul_int_tiles(call: OpCall) -> Sequence[Candidate]:
    """Tiles of a gate and what it multiplies."""
    return _best(call)


@cuda_kernel(grouped_linear_mx, "tiles", applies=sixteen_bits, invariant=True)
def grouped_linear_mx_tiles(call: OpCall) -> Sequence[Candidate]:
    """The same with MXFP4 and NVFP4."""
    return _best(call)


@cuda_kernel(grouped_silu_mul_mx, "tiles", applies=sixteen_bits, invariant=True)
def grouped_silu_mul_mx_tiles(call: OpCall) -> Sequence[Candidate]:
    """Tiles of a gate and what it multiplies, with MXFP4 and NVFP4."""
    return _best(call)


@cuda_kernel(grouped_clamped_swiglu_mx, "tiles", applies=sixteen_bits, invariant=True)
def grouped_clamped_swiglu_mx_tiles(call: OpCall) -> Sequence[Candidate]:
    """The same with gpt-oss's gate."""
    return _best(call)


def _best(call: OpCall) -> list[Candidate]:
    """The ways that differ in more than pipeline depth; all where one of them is to serve every batch shape."""
    made = candidates(call)
    if call.invariant:
        return made
    distinct: dict[str, Candidate] = {}
    for way in made:
        distinct.setdefault(way.name.rpartition("_")[0], way)
    return list(distinct.values())


def candidates(call: OpCall) -> list[Candidate]:
    """Every way to run ``call``, the cheapest first."""
    return [emit(call, way) for way in tilings(call)]


def product_of(call: OpCall) -> Grouped:
    """What cost models need to know of the call: weights are of fewer bits than words, with scales beside them."""
    bits, group, _ = form_of(call)
    scales = 8 * DTYPE_BYTES[call.tensors["weight_scale"].dtype]
    shared = (scales + 8 * zero_bytes(call)) / group
    return replace(describe(call), weight_bytes=(bits + shared) / 8)


def tilings(call: OpCall) -> list[Tiling]:
    """Every way, the cheapest first by a model that is reasoned."""
    product = product_of(call)
    return sorted(_ways(call, product), key=lambda w: (_seconds(call, product, w), w.name))


def _seconds(call: OpCall, product: Grouped, way: Tiling) -> float:
    tiles = product.tiles(way.t) * -(-product.outputs // way.n)
    busy = min(1.0, tiles / (_A_MULTIPROCESSOR * call.multiprocessors))
    return predicted(call, product, way, memory_share=_MEMORY * busy)


def _ways(call: OpCall, product: Grouped) -> Iterator[Tiling]:
    halves, (bits, *_) = product.outputs // product.columns, form_of(call)
    for t, n, warps, gated in _SIDES:
        if (halves > 1 and not gated) or (not call.invariant and mismatched(t, product)):
            continue
        stage = halves * n * SPAN * bits // 8 + t * SPAN * 2
        stages = min(4, call.shared_bytes // _A_MULTIPROCESSOR // stage)
        if stages >= 2:
            yield Tiling(t, n, SPAN, warps, stages)


def emit(call: OpCall, way: Tiling) -> Candidate:
    """The launch of ``call`` cut in this ``way``."""
    x, y = call.tensors["x"], call.tensors["y"]
    experts, entries, top_k = call.dims["E"], call.dims["M"], call.attrs["top_k"]
    outputs = int(y.shape[1])
    dependent = "pdl" in call.features
    names = ["x", "weight", "weight_scale", "start", "y", *(("order",) if top_k else ())]
    names += [name for name in _OPTIONAL if name in call.tensors]
    bits, group, is_mx = form_of(call)
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
        "MX": is_mx,
        "BITS": bits,
        "GROUP": group,
        "BT": way.t,
        "BN": way.n,
        **gate_constants(call),
        "PDL": dependent,
        **({} if top_k else {"order": None}),
        **{name: None for name in _OPTIONAL if name not in call.tensors},
    }
    tiles = -(-entries // way.t) + min(entries, experts)
    launch = DeviceLaunch(
        function="makeready.kernels.moe.grouped_packed_triton:grouped_packed",
        constants=constants,
        arguments=arguments,
        grid=(min(tiles * -(-outputs // way.n), _A_MULTIPROCESSOR * call.multiprocessors), 1, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
    )
    return Candidate(way.name, (launch,), seconds=_seconds(call, product_of(call), way))
