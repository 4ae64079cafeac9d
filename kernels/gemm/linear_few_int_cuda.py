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
_ALONE = {4: 64, 8: 32}  # columns of a product with which a block has a multiprocessor to itself, by bits
_DEPTH = 256  # inputs of a step: two spans
_WIDE = ("bfloat16", "float16")
_COSTS = Costs(
    start=1.05,
    tile=0.6,
    exchange=0.83,
    block=0.13,
    step=0.30,
    column=0.004,
    memory=1.1,
    from_l2=6.8e12,
)
# By analogy: a number takes twice as many instructions, or a step has twice as many words; nobody timed it.
_COSTS_UNTIMED = replace(_COSTS, step=0.45)
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
        and _steps(call) >= 2
        and addressable(x)
        and addressable(weight)
        and y.alignment % (16 if y.dtype == "float32" else 8) == 0
        and y.row_stride % 4 == 0
        and all(call.tensors[n].alignment % 16 == 0 for n in _fixed(call))
    )


def _timed(call: OpCall) -> bool:
    bits, group, floats = form_of(call)
    alike = call.tensors["y"].dtype == call.tensors["x"].dtype
    return applies(call) and bits == 4 and not floats and group % 128 == 0 and alike


def _untimed(call: OpCall) -> bool:
    return applies(call) and not _timed(call)


def _fixed(call: OpCall) -> tuple[str, ...]:
    """What comes with the words."""
    return ("weight_scale", *(name for name in _OPTIONAL if name in call.tensors))


def _steps(call: OpCall) -> int:
    return -(-int(call.tensors["x"].shape[1]) // _DEPTH)


def ways(call: OpCall) -> list[Way]:
    """Every way to run ``call``, the cheapest first."""
    found, (bits, *_) = few.ways(call, _steps(call)), form_of(call)
    room = [way for way in found if way.tokens < _ALONE[bits] or way.blocks <= call.multiprocessors]
    return sorted(room, key=lambda way: (_microseconds(call, way), way.name))


def _microseconds(call: OpCall, way: Way) -> float:
    bits, group, _ = form_of(call)
    shared = DTYPE_BYTES[call.tensors["weight_scale"].dtype] + zero_bytes(call)
    scales = _DEPTH // min(group, 128) * shared
    weights, costs = few.OUTPUTS * (_DEPTH * bits // 8 + scales), _COSTS if _timed(call) else _COSTS_UNTIMED
    return few.microseconds(call, way, _steps(call), costs, weights=weights, tokens=2 * _DEPTH)


def candidate(call: OpCall, way: Way, *, give_up: int = 0) -> Candidate:
    """The launch of ``call`` cut in this ``way``.

    Args:
        give_up: as in :func:`makeready.kernels.attention.extend_cuda.candidate`.
    """
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    zeros, (bits, group, floats) = "weight_zero" in call.tensors, form_of(call)
    added, wide = offsets(call), y.dtype == "float32"
    paired = "weight_global_scale" in call.tensors
    inputs = int(x.shape[1])
    constants = {
        "TOKENS": way.tokens,
        "SPLIT": way.split,
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
            "x", (inputs // 64, rows, 64), (64, x.row_stride, 1), (_DEPTH // 64, way.tokens, 64), swizzle=128
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


@cuda_kernel(linear_int, "few", features=("tma", "wgmma", "pdl"), applies=_timed)
def linear_few_int(call: OpCall) -> Sequence[Candidate]:
    """The best few, the cheapest first."""
    return [candidate(call, way) for way in best_of_each(ways(call), lambda way: way)]


@cuda_kernel(linear_int, "few_untimed", features=("tma", "wgmma", "pdl"), applies=_untimed, tuned_only=True)
def linear_few_parts(call: OpCall) -> Sequence[Candidate]:
    """The same with 8 bits, groups that lie in spans, or results in fp32, which was never timed."""
    return [candidate(call, way) for way in best_of_each(ways(call), lambda way: way)]


@cuda_kernel(linear_mx, "few", features=("tma", "wgmma", "pdl"), applies=applies, tuned_only=True)
def linear_few_mx(call: OpCall) -> Sequence[Candidate]:
    """The same with 4-bit floats, which was never timed."""
    return [candidate(call, way) for way in best_of_each(ways(call), lambda way: way)]
