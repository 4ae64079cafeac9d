"""Products of one row on Hopper in CUDA C++ (csrc/gemv.cu): the weights stream through a ring in shared memory.

Half of a multiprocessor's shared memory is left to the next kernel, which is launched early and asks for its weights
before this one has ended. So weights must be parameters: what a step computes is not there yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.gemm.linear import linear
from makeready.kernels.registry import cuda_kernel

assert isinstance(linear, Contract)

_MOST_INPUTS = 16384  # beyond, two blocks have no room in the registers of a multiprocessor
# Bytes a second from memory that all products of Qwen3-8B in a row reach beside a copy's (4.54 TB/s on one H200, whose
# copies are taken to have 4.3), and seconds of a launch on top: 11 to 47 us for 34 to 201 MB.
_STREAMED, _LAUNCH = 1.05, 2.3e-6


@cuda_kernel(linear, "gemv", features=("tma", "pdl"), applies=lambda call: applies(call))
def linear_gemv(call: OpCall) -> Sequence[Candidate]:
    """The one way there is."""
    return [candidate(call)]


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
        and all(t.parameter for t in fixed)
        and all(t.alignment % 16 == 0 for t in (*fixed, *moving))
        and int(weight.shape[1]) % 8 == 0
        and int(weight.shape[1]) <= _MOST_INPUTS
    )


def candidate(call: OpCall, *, norm: int = 0, gate: bool = False, give_up: int = 0) -> Candidate:
    """The launch for ``call``.

    Args:
        norm: 0: the product is of ``x``; 1: of its norm; 2: of the norm of ``x + residual``.
        gate: the product's first half is a gate of its second one.
        give_up: as in :func:`makeready.kernels.attention.extend_cuda.candidate`.
    """
    weight, wide = call.tensors["weight"], call.tensors["y"].dtype == "float32"
    outputs, inputs = (int(n) for n in weight.shape)
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
    )
    seconds = _LAUNCH + 2 * outputs * inputs / (_STREAMED * call.bandwidth)
    return Candidate("ring", (launch,), seconds=seconds)


def _pointers(call: OpCall) -> Mapping[str, Pointer]:
    """Operands and results; what the call lacks, and the kernel does not touch, is ``x``."""
    names = ("weight", "x", "residual", "gain", "bias", "y", "residual_out")
    return {name: Pointer(name if name in call.tensors else "x") for name in names}
