"""Products of one row on Hopper in CUDA C++ (csrc/gemv.cu): the weights stream through a ring in shared memory.

Half of a multiprocessor's shared memory is left to the next kernel, which is launched early and asks for its weights
before this one has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.norm_linear import (
    add_rms_norm_linear,
    add_rms_norm_linear_silu_mul,
    rms_norm_linear,
)
from makeready.kernels.registry import cuda_kernel

# What of a chain the launch is told: how x becomes the product's row, and whether its first half is a gate.
_FORMS: Mapping[str, tuple[int, bool]] = {
    "linear": (0, False),
    "rms_norm_linear": (1, False),
    "add_rms_norm_linear": (2, False),
    "add_rms_norm_linear_silu_mul": (2, True),
}

_MOST_INPUTS = 16384  # beyond, two blocks have no room in the registers of a multiprocessor
# Share of the bandwidth at which one product of 15.1 GB streamed on one H200. As in linear_cost.py, what any launch
# takes to start is not counted.
_STREAMED = 1.01


def applies(call: OpCall) -> bool:
    """Whether it is one row and 16 bits throughout, and weights are rows of whole 16-byte pieces."""
    x, weight = call.tensors["x"], call.tensors["weight"]
    fixed = [call.tensors[n] for n in ("weight", "gain", "bias") if n in call.tensors]
    moving = [call.tensors[n] for n in ("x", "residual", "residual_out") if n in call.tensors]
    return (
        x.shape[0] == 1
        and x.dtype in ("bfloat16", "float16")
        and all(t.dtype == x.dtype for t in (*fixed, *moving))
        and call.tensors["y"].dtype in (x.dtype, "float32")
        and all(t.alignment % 16 == 0 for t in (*fixed, *moving))
        and int(weight.shape[1]) % 8 == 0
        and int(weight.shape[1]) <= _MOST_INPUTS
    )


def candidate(call: OpCall, *, give_up: int = 0) -> Candidate:
    """The launch for ``call``.

    Args:
        give_up: as in :func:`makeready.kernels.attention.extend_cuda.candidate`.
    """
    weight, wide = call.tensors["weight"], call.tensors["y"].dtype == "float32"
    outputs, inputs = (int(n) for n in weight.shape)
    norm, gate = _FORMS[call.op]
    constants = {
        "K": inputs,
        "NORM": norm,
        "GATE": gate,
        "BIAS": "bias" in call.tensors,
        "WIDE": wide,
        "FP16": call.tensors["x"].dtype == "float16",
    }
    given = _pointers(call)
    rows = outputs // 2 if gate else outputs
    launch = DeviceLaunch(
        function=f"csrc/gemv.cu:{'gemv_wide' if wide else 'gemv'}",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments={
            **given,
            "n": Scalar(rows, "int32"),
            "eps": Scalar(call.attrs.get("eps", 0.0), "float32"),
            "offset": Scalar(call.attrs.get("offset", 0.0), "float32"),
        },
        grid=(min(call.multiprocessors, rows), 1, 1),
        dependent=True,
        early=tuple(name for name in ("weight", "gain", "bias") if name in call.tensors),
    )
    seconds = 2 * outputs * inputs / (_STREAMED * call.bandwidth)
    return Candidate("ring", (launch,), seconds=seconds)


def _pointers(call: OpCall) -> Mapping[str, Pointer]:
    """Operands and results; what the call lacks, and the kernel does not touch, is ``x``."""
    names = ("weight", "x", "residual", "gain", "bias", "y", "residual_out")
    return {name: Pointer(name if name in call.tensors else "x") for name in names}


def _gemv(call: OpCall) -> Sequence[Candidate]:
    """The one way there is."""
    return [candidate(call)]


for _op in (linear, rms_norm_linear, add_rms_norm_linear, add_rms_norm_linear_silu_mul):
    assert isinstance(_op, Contract)
    cuda_kernel(_op, "gemv", features=("tma", "pdl"), applies=applies)(_gemv)
