"""Products of few tokens with weights of 4 bits on Hopper in CUDA C++ (csrc/linear_few_int.cu): integers and floats.

As linear_few_cuda.py; words are widened in the registers that the matrix instructions read. Sums of integers are
scaled, 4-bit floats before they are multiplied.

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
from makeready.kernels.gemm.linear_int_triton import form_of
from makeready.kernels.gemm.linear_mx import linear_mx
from makeready.kernels.gemm.ways import addressable, best_of_each
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

_MOST = 64  # tokens
_ALONE = 64  # columns of a product with which a block has a multiprocessor to itself
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
_COSTS_FLOATS = replace(
    _COSTS, step=0.45
)  # by analogy: a number takes twice as many instructions; nobody timed it
_OPTIONAL = ("weight_zero", "weight_global_scale")


def applies(call: OpCall) -> bool:
    """Whether it has few tokens, words of 4 bits, and groups that no span of 128 inputs is cut by."""
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    inputs = int(x.shape[1])
    bits, group, floats = form_of(call)
    return (
        not call.invariant
        and int(x.shape[0]) <= _MOST
        and bits == 4
        and (floats or group % 128 == 0)
        and x.dtype in _WIDE
        and inputs % 64 == 0
        and y.dtype == x.dtype
        and ("bias" not in call.tensors or call.tensors["bias"].dtype == x.dtype)
        and int(weight.shape[0]) % 4 == 0
        and _steps(call) >= 2
        and addressable(x)
        and addressable(weight)
        and y.alignment % 8 == 0
        and y.row_stride % 4 == 0
        and all(call.tensors[n].alignment % 16 == 0 for n in _fixed(call))
    )


def _fixed(call: OpCall) -> tuple[str, ...]:
    """What comes with the words."""
    return ("weight_scale", *(name for name in _OPTIONAL if name in call.tensors))


def _steps(call: OpCall) -> int:
    return -(-int(call.tensors["x"].shape[1]) // _DEPTH)


def ways(call: OpCall) -> list[Way]:
    """Every way to run ``call``, the cheapest first."""
    found = few.ways(call, _steps(call))
    room = [way for way in found if way.tokens < _ALONE or way.blocks <= call.multiprocessors]
    return sorted(room, key=lambda way: (_microseconds(call, way), way.name))


def _microseconds(call: OpCall, way: Way) -> float:
    zeros, (_, _, floats) = "weight_zero" in call.tensors, form_of(call)
    scales = 8 * DTYPE_BYTES[call.tensors["weight_scale"].dtype] if floats else 4 + 2 * zeros
    weights, costs = few.OUTPUTS * (_DEPTH // 2 + scales), _COSTS_FLOATS if floats else _COSTS
    return few.microseconds(call, way, _steps(call), costs, weights=weights, tokens=2 * _DEPTH)


def candidate(call: OpCall, way: Way, *, give_up: int = 0) -> Candidate:
    """The launch of ``call`` cut in this ``way``.

    Args:
        give_up: as in :func:`makeready.kernels.attention.extend_cuda.candidate`.
    """
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    zeros, (_, group, floats) = "weight_zero" in call.tensors, form_of(call)
    paired = "weight_global_scale" in call.tensors
    inputs = int(x.shape[1])
    constants = {
        "TOKENS": way.tokens,
        "SPLIT": way.split,
        "SCALES": 3 if paired else 0,
        "GROUP": group,
        "ZEROS": zeros,
        **({"FLOATS": 1 + paired} if floats else {}),
        "BIAS": "bias" in call.tensors,
        "WIDE": False,
        "FP16": x.dtype == "float16",
    }
    outputs, words = (int(n) for n in weight.shape)
    rows = way.tokens if x.spare else int(x.shape[0])
    fixed = _fixed(call)
    entry = ("nvfp4" if paired else "mxfp4") if floats else f"int{'_zeros' if zeros else ''}"
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


@cuda_kernel(linear_int, "few", features=("tma", "wgmma", "pdl"), applies=applies)
def linear_few_int(call: OpCall) -> Sequence[Candidate]:
    """The best few, the cheapest first."""
    return [candidate(call, way) for way in best_of_each(ways(call), lambda way: way)]


@cuda_kernel(linear_mx, "few", features=("tma", "wgmma", "pdl"), applies=applies, tuned_only=True)
def linear_few_mx(call: OpCall) -> Sequence[Candidate]:
    """The same with 4-bit floats, which was never timed."""
    return [candidate(call, way) for way in best_of_each(ways(call), lambda way: way)]
