"""Products of few tokens with packed weights on Hopper in CUDA C++ (csrc/linear_few_int.cu): integers, 4-bit floats.

As linear_few_cuda.py; words are widened in the registers that the matrix instructions read. Where a group of integers
is whole spans of 128 inputs, sums are scaled; all else before it is multiplied.

# T tokens, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from makeready.kernels.contract import Contract
from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
)
from makeready.kernels.gemm import few
from makeready.kernels.gemm.few import Costs, Way
from makeready.kernels.gemm.linear_int import linear_int
from makeready.kernels.gemm.linear_int_triton import form_of, offsets, zero_bytes
from makeready.kernels.gemm.linear_mx import linear_mx
from makeready.kernels.gemm.ways import addressable, best_of_each
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

_MOST = 64  # tokens
_MOST_OF_FOUR = 16  # columns of a product of blocks of four warpgroups
_ALONE = {4: 64, 8: 32}  # columns of a product with which a block has a multiprocessor to itself, by bits
_SPAN = 128  # inputs of a step for each warpgroup
_WIDE = ("bfloat16", "float16")
# By warpgroups of a block. Fitted to one H200 with the projections of Qwen3-8B at 2 and 16 tokens
# (bench/results/h200_gemm_few_int.json); 32 and 64 tokens, of two warpgroups, to the kernel before this one.
_COSTS = {
    2: Costs(
        start=1.05, tile=0.7, exchange=1.0, block=0.4, step=0.45, column=0.006, memory=1.1, from_l2=6.8e12
    ),
    4: Costs(
        start=1.05, tile=0.7, exchange=1.0, block=0.4, step=0.42, column=0.0125, memory=1.1, from_l2=6.8e12
    ),
}
# Microseconds of a step on top, by warpgroups: where groups lie in spans, and of 8 bits.
_PARTS = {2: 0.13, 4: 0.24}
_EIGHT = {2: 0.22, 4: 0.3}
_OPTIONAL = ("weight_zero", "weight_global_scale")


def applies(call: OpCall) -> bool:
    """Whether it has few tokens, and groups that are whole spans of 128 inputs or lie in them.

    Of the latter there are no zero points, and of the former no offsets; results in fp32 are of symmetric integers.
    """
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    inputs = int(x.shape[1])
    _, group, floats = form_of(call)
    points, symmetric = zero_bytes(call) == 1, not floats and not zero_bytes(call)
    return (
        not call.invariant
        and int(x.shape[0]) <= _MOST
        and (floats or (not offsets(call) if group % 128 == 0 else group in (16, 32, 64) and not points))
        and x.dtype in _WIDE
        and inputs % 64 == 0
        and (y.dtype == x.dtype or (y.dtype == "float32" and symmetric))
        and ("bias" not in call.tensors or call.tensors["bias"].dtype == x.dtype)
        and int(weight.shape[0]) % 4 == 0
        and _steps(call, 2) >= 2
        and addressable(x)
        and addressable(weight)
        and y.alignment % (16 if y.dtype == "float32" else 8) == 0
        and y.row_stride % 4 == 0
        and all(call.tensors[n].alignment % 16 == 0 for n in _fixed(call))
    )


def _fixed(call: OpCall) -> tuple[str, ...]:
    """What comes with the words."""
    return ("weight_scale", *(name for name in _OPTIONAL if name in call.tensors))


def _spans(call: OpCall, way: Way) -> int:
    """Warpgroups of a block: sixteen warps share a multiprocessor, two blocks' where it has two."""
    return 4 if way.blocks <= call.multiprocessors and way.tokens <= _MOST_OF_FOUR else 2


def _steps(call: OpCall, spans: int) -> int:
    return -(-int(call.tensors["x"].shape[1]) // (_SPAN * spans))


def ways(call: OpCall) -> list[Way]:
    """Every way to run ``call``, the cheapest first."""
    found, (bits, *_) = few.ways(call, _steps(call, 2)), form_of(call)
    room = [way for way in found if way.tokens < _ALONE[bits] or way.blocks <= call.multiprocessors]
    return sorted(room, key=lambda way: (_microseconds(call, way), way.name))


def _microseconds(call: OpCall, way: Way) -> float:
    (bits, group, _), spans = form_of(call), _spans(call, way)
    depth = _SPAN * spans
    shared = DTYPE_BYTES[call.tensors["weight_scale"].dtype] + zero_bytes(call)
    scales = depth // min(group, _SPAN) * shared
    weights = few.OUTPUTS * (depth * bits // 8 + scales)
    costs = _COSTS[spans]
    step = costs.step + (_PARTS[spans] if group < _SPAN else 0.0) + (_EIGHT[spans] if bits == 8 else 0.0)
    costs = replace(costs, step=step)
    return few.microseconds(call, way, _steps(call, spans), costs, weights=weights, tokens=2 * depth)


def candidate(call: OpCall, way: Way, *, give_up: int = 0) -> Candidate:
    """The launch of ``call`` cut in this ``way``.

    Args:
        give_up: as in :func:`makeready.kernels.attention.extend_cuda.candidate`.
    """
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    zeros, (bits, group, floats) = "weight_zero" in call.tensors, form_of(call)
    added, wide = offsets(call), y.dtype == "float32"
    paired = "weight_global_scale" in call.tensors
    inputs, spans = int(x.shape[1]), _spans(call, way)
    boxes = _SPAN * spans // 64
    constants = {
        "TOKENS": way.tokens,
        "SPLIT": way.split,
        **({"SPANS": spans} if spans != 2 else {}),
        "SCALES": 3 if paired else 0,
        "GROUP": group,
        "ZEROS": 2 if added else zeros,
        **({"FLOATS": 1 + paired} if floats else {}),
        **({"BITS": bits} if bits != 4 else {}),
        "BIAS": "bias" in call.tensors,
        "WIDE": wide,
        "FP16": x.dtype == "float16",
    }
    outputs, words = (int(n) for n in weight.shape)
    rows = way.tokens if x.spare else int(x.shape[0])
    fixed = _fixed(call)
    integers = "int_offsets" if added else "int_zeros" if zeros else "int_wide" if wide else "int"
    entry = ("nvfp4" if paired else "mxfp4") if floats else integers
    arguments: dict[str, Argument] = {
        "x_map": Descriptor(
            "x", (inputs // 64, rows, 64), (64, x.row_stride, 1), (boxes, way.tokens, 64), swizzle=128
        ),
        "w_map": Descriptor(
            "weight", (outputs, words), (weight.row_stride, 1), (few.OUTPUTS, 64), swizzle=128
        ),
        **{name: Pointer(name) for name in fixed},
        "bias": Pointer("bias" if "bias" in call.tensors else "x"),
        "y": Pointer("y"),
        "tokens": Scalar(int(x.shape[0]), "int32"),
        "outputs": Scalar(outputs, "int32"),
        "inputs": Scalar(inputs, "int32"),
        "y_stride": Scalar(y.row_stride, "int32"),
    }
    launch = DeviceLaunch(
        function=f"csrc/linear_few_int.cu:linear_few_{entry}",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments=arguments,
        grid=(way.blocks, 1, 1),
        dependent=True,
        early=("weight", *fixed),
    )
    return Candidate(way.name, (launch,), seconds=1e-6 * _microseconds(call, way))


assert isinstance(linear_int, Contract)
assert isinstance(linear_mx, Contract)


def _few(call: OpCall) -> Sequence[Candidate]:
    """The best few, the cheapest first."""
    return [candidate(call, way) for way in best_of_each(ways(call), lambda way: way)]


for _op in (linear_int, linear_mx):
    cuda_kernel(_op, "few", features=("tma", "wgmma", "pdl"), applies=applies)(_few)
