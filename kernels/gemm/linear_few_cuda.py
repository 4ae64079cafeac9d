"""Products of few tokens on Hopper in CUDA C++ (csrc/linear_few.cu): 16 bits, and 8 with any scales, INT8 too.

Weights are the long side of the matrix instructions and are asked for before the kernels ahead have ended. Where a
matrix has few outputs the blocks of a cluster share the inputs of a tile.

# T tokens, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Sequence

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
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_fp8 import linear_fp8, linear_fp8_block
from makeready.kernels.gemm.linear_int8 import MOST_INPUTS, linear_int8
from makeready.kernels.gemm.ways import addressable, best_of_each
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

_MOST = 64  # tokens
_BOX = 128  # bytes of a row that a step copies
_WIDE = ("bfloat16", "float16")
_EIGHT = ("float8_e4m3fn", "int8")

# Those of integers are taken to be those of e4m3, whose bytes and instructions they have: nobody has timed them.
# Fitted to one H200 with the projections of Qwen3-8B and DeepSeek-V2-Lite at 2 to 64 tokens, 16 bits and 8 with
# scales of rows (``scripts/bench.py suite=[gemm_few]``): predictions are off by 10 %, the way that is predicted to be
# fastest takes 0.3 % longer than the one that was.
_COSTS = Costs(
    start=1.05,
    tile=0.46,
    exchange=0.83,
    block=0.13,
    step=0.174,
    column=0.0019,
    memory=1.1,
    from_l2=6.8e12,
)


def applies(call: OpCall) -> bool:
    """Whether it has few tokens, and rows that tensor maps and copies of four results can address."""
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    eight = weight.dtype in _EIGHT
    four = 4 * DTYPE_BYTES[y.dtype]
    alike = y.dtype if eight else x.dtype
    return (
        not call.invariant
        and int(x.shape[0]) <= _MOST
        and x.dtype == weight.dtype
        and (eight or x.dtype in _WIDE)
        and y.dtype in (_WIDE if eight else (x.dtype, "float32"))
        and ("bias" not in call.tensors or call.tensors["bias"].dtype == alike)
        and int(weight.shape[0]) % 4 == 0
        and _steps(call) >= 2
        and (weight.dtype != "int8" or int(weight.shape[1]) <= MOST_INPUTS)
        and addressable(x)
        and addressable(weight)
        and y.alignment % four == 0
        and y.row_stride % 4 == 0
        and (not eight or _plain_scales(call))
    )


def _plain_scales(call: OpCall) -> bool:
    """One a token and one an output, or of groups and squares of 128 in rows without gaps."""
    scale, inputs = call.tensors["x_scale"], call.dims["K"]
    if "block" not in call.attrs:
        return scale.row_stride == 1
    groups = inputs // 128
    dense = scale.row_stride == call.tensors["weight_scale"].row_stride == groups
    return call.attrs["block"] == 128 and inputs % 128 == 0 and dense


def _steps(call: OpCall) -> int:
    weight = call.tensors["weight"]
    return -(-int(weight.shape[1]) * DTYPE_BYTES[weight.dtype] // _BOX)


def ways(call: OpCall) -> list[Way]:
    """Every way to run ``call``, the cheapest first."""
    return sorted(few.ways(call, _steps(call)), key=lambda way: (_microseconds(call, way), way.name))


def _microseconds(call: OpCall, way: Way) -> float:
    return few.microseconds(call, way, _steps(call), _COSTS, weights=few.OUTPUTS * _BOX, tokens=_BOX)


def candidate(call: OpCall, way: Way, *, give_up: int = 0) -> Candidate:
    """The launch of ``call`` cut in this ``way``.

    Args:
        give_up: as in :func:`makeready.kernels.attention.extend_cuda.candidate`.
    """
    x, weight, y = (call.tensors[name] for name in ("x", "weight", "y"))
    eight, wide = weight.dtype in _EIGHT, y.dtype == "float32"
    scales = (2 if "block" in call.attrs else 1) if eight else 0
    constants = {
        "TOKENS": way.tokens,
        "SPLIT": way.split,
        "FP8": weight.dtype == "float8_e4m3fn",
        **({"INT8": True} if weight.dtype == "int8" else {}),
        "SCALES": scales,
        **({"SHARE": -(-_steps(call) // way.split)} if scales == 2 else {}),
        "BIAS": "bias" in call.tensors,
        "WIDE": wide,
        "FP16": (y if eight else x).dtype == "float16",
    }
    step = _BOX // DTYPE_BYTES[weight.dtype]
    outputs, inputs = (int(n) for n in weight.shape)
    rows = (
        way.tokens if x.spare else int(x.shape[0])
    )  # the GPU is slow at making zeros (see linear_triton.py)
    arguments: dict[str, Argument] = {
        "x_map": Descriptor("x", (rows, inputs), (x.row_stride, 1), (way.tokens, step), swizzle=128),
        "w_map": Descriptor(
            "weight", (outputs, inputs), (weight.row_stride, 1), (few.OUTPUTS, step), swizzle=128
        ),
        **({n: Pointer(n) for n in ("x_scale", "weight_scale")} if eight else {}),
        "bias": Pointer("bias" if "bias" in call.tensors else ("x" if x.dtype in _WIDE else "y")),
        "y": Pointer("y"),
        "tokens": Scalar(int(x.shape[0]), "int32"),
        "outputs": Scalar(outputs, "int32"),
        "inputs": Scalar(inputs, "int32"),
        "y_stride": Scalar(y.row_stride, "int32"),
    }
    entry = "linear_few_eight" if eight else "linear_few_wide" if wide else "linear_few"
    launch = DeviceLaunch(
        function=f"csrc/linear_few.cu:{entry}",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments=arguments,
        grid=(way.blocks, 1, 1),
        dependent=True,
        early=("weight",),
    )
    return Candidate(way.name, (launch,), seconds=1e-6 * _microseconds(call, way))


def _few(call: OpCall) -> Sequence[Candidate]:
    """The best few, the cheapest first."""
    return [candidate(call, way) for way in best_of_each(ways(call), lambda way: way)]


for _op in (linear, linear_fp8, linear_fp8_block, linear_int8):
    assert isinstance(_op, Contract)
    untimed = _op is linear_int8
    cuda_kernel(_op, "few", features=("tma", "wgmma", "pdl"), applies=applies, tuned_only=untimed)(_few)
