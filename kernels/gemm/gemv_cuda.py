"""Products of one row on Hopper in CUDA C++ (csrc/gemv.cu): the weights stream through a ring in shared memory.

Half of a multiprocessor's shared memory is left to the next kernel, which is launched early and asks for its weights
before this one has ended. What becomes the row (a sum, a norm, a gate, 8-bit floats) every block computes for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Tensor
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_fp8_chains import (
    add_rms_norm_quantize_fp8_linear_fp8,
    quantize_fp8_linear_fp8,
    rms_norm_quantize_fp8_linear_fp8,
    silu_mul_quantize_fp8_linear_fp8,
)
from makeready.kernels.gemm.norm_linear import (
    add_rms_norm_linear,
    add_rms_norm_linear_silu_mul,
    rms_norm_linear,
)
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

_FIXED = ("weight", "weight_scale", "gain", "bias")  # what a step does not compute, as a rule
_MOVING = ("x", "gate_up", "residual", "residual_out")
_MOST_INPUTS = 16384  # beyond, two blocks have no room in the registers of a multiprocessor
# Share of the bandwidth at which one product of 15.1 GB streamed on one H200. As in linear_cost.py, what any launch
# takes to start is not counted.
_STREAMED = 1.01


@dataclass(frozen=True)
class _Form:
    """How an op's row comes to be, and whether what it gives is a gate; see csrc/gemv.cu."""

    norm: int = 0
    gate: bool = False
    fp8: bool = False


_FORMS: Mapping[str, _Form] = {
    "linear": _Form(),
    "rms_norm_linear": _Form(norm=1),
    "add_rms_norm_linear": _Form(norm=2),
    "add_rms_norm_linear_silu_mul": _Form(norm=2, gate=True),
    "quantize_fp8_linear_fp8": _Form(fp8=True),
    "rms_norm_quantize_fp8_linear_fp8": _Form(norm=1, fp8=True),
    "add_rms_norm_quantize_fp8_linear_fp8": _Form(norm=2, fp8=True),
    "silu_mul_quantize_fp8_linear_fp8": _Form(norm=3, fp8=True),
}


def _row(call: OpCall) -> Tensor:
    return call.tensors["x" if "x" in call.tensors else "gate_up"]


def applies(call: OpCall) -> bool:
    """Whether it is one row of 16 bits, and weights are of as many or of 8, in rows of whole 16-byte pieces."""
    x, weight, y = _row(call), call.tensors["weight"], call.tensors["y"]
    inputs, fp8 = int(weight.shape[1]), _FORMS[call.op].fp8
    alike = [call.tensors[n] for n in ("gain", "bias", "residual", "residual_out") if n in call.tensors]
    addressed = [call.tensors[n] for n in ("weight", "gain", *_MOVING) if n in call.tensors]
    return (
        x.shape[0] == 1
        and x.dtype in ("bfloat16", "float16")
        and weight.dtype == ("float8_e4m3fn" if fp8 else x.dtype)
        and all(t.dtype == x.dtype for t in alike)
        and y.dtype in ((x.dtype,) if fp8 else (x.dtype, "float32"))
        and all(t.alignment % 16 == 0 for t in addressed)
        and inputs * DTYPE_BYTES[weight.dtype] % 16 == 0
        and inputs <= _MOST_INPUTS
        and call.attrs.get("group", inputs) == inputs
    )


def candidate(call: OpCall, *, give_up: int = 0) -> Candidate:
    """The launch for ``call``.

    Args:
        give_up: as in :func:`makeready.kernels.attention.extend_cuda.candidate`.
    """
    weight, wide, form = call.tensors["weight"], call.tensors["y"].dtype == "float32", _FORMS[call.op]
    outputs, inputs = (int(n) for n in weight.shape)
    rows = outputs // 2 if form.gate else outputs
    constants = {
        "K": inputs,
        "NORM": form.norm,
        "GATE": form.gate,
        "FP8": form.fp8,
        "BIAS": "bias" in call.tensors,
        "WIDE": wide,
        "FP16": _row(call).dtype == "float16",
    }
    launch = DeviceLaunch(
        function=f"csrc/gemv.cu:{'gemv_fp8' if form.fp8 else 'gemv_wide' if wide else 'gemv'}",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments={
            **_pointers(call, form),
            "n": Scalar(rows, "int32"),
            "eps": Scalar(call.attrs.get("eps", 0.0), "float32"),
            "offset": Scalar(call.attrs.get("offset", 0.0), "float32"),
        },
        grid=(min(call.multiprocessors, rows), 1, 1),
        dependent=True,
        early=tuple(name for name in _FIXED if name in call.tensors),
    )
    seconds = outputs * inputs * DTYPE_BYTES[weight.dtype] / (_STREAMED * call.bandwidth)
    return Candidate("ring", (launch,), seconds=seconds)


def _pointers(call: OpCall, form: _Form) -> dict[str, Pointer]:
    """Operands and results by parameter; what the call lacks, and the kernel does not touch, is the row."""
    row = "x" if "x" in call.tensors else "gate_up"
    names = ("weight", "residual", "gain", "bias", "y", "residual_out")
    found = {name: Pointer(name if name in call.tensors else row) for name in names} | {"x": Pointer(row)}
    return found | ({"weight_scale": Pointer("weight_scale")} if form.fp8 else {})


def _gemv(call: OpCall) -> Sequence[Candidate]:
    """The one way there is."""
    return [candidate(call)]


for _op in (
    linear,
    rms_norm_linear,
    add_rms_norm_linear,
    add_rms_norm_linear_silu_mul,
    quantize_fp8_linear_fp8,
    rms_norm_quantize_fp8_linear_fp8,
    add_rms_norm_quantize_fp8_linear_fp8,
    silu_mul_quantize_fp8_linear_fp8,
):
    assert isinstance(_op, Contract)
    cuda_kernel(_op, "gemv", features=("tma", "pdl"), applies=applies)(_gemv)
