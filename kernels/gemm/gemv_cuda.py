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
from makeready.kernels.gemm.linear_fp8 import linear_fp8_block
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
# Of a vocabulary's projection the ring keeps 0.86 of the bandwidth and products of few tokens 0.98: 317 and 290 us.
_MOST_OUTPUTS_BEHIND_NORM = 65536
_MOST_INPUTS = 16384  # beyond, two blocks have no room in the registers of a multiprocessor
# Fitted to the one-row step of Qwen3-8B on one H200 (bench/results/h200_steps.json), products of 33 MB to 1.2 GB:
# what a launch takes where it may start early, and the share of the bandwidth of reads.
_START = 0.6e-6
_STREAMED = 0.89
_BLOCKS = 2
_WIDE = ("bfloat16", "float16")


@dataclass(frozen=True)
class _Form:
    """How an op's row comes to be, whether what it gives is a gate, and its 8-bit floats; see csrc/gemv.cu."""

    norm: int = 0
    gate: bool = False
    fp8: int = 0

    @property
    def blocks(self) -> bool:
        """Whether the row has 8 bits already, and scales are of groups and squares of 128."""
        return self.fp8 == _BLOCKS


_FORMS: Mapping[str, _Form] = {
    "linear": _Form(),
    "rms_norm_linear": _Form(norm=1),
    "add_rms_norm_linear": _Form(norm=2),
    "add_rms_norm_linear_silu_mul": _Form(norm=2, gate=True),
    "quantize_fp8_linear_fp8": _Form(fp8=1),
    "rms_norm_quantize_fp8_linear_fp8": _Form(norm=1, fp8=1),
    "add_rms_norm_quantize_fp8_linear_fp8": _Form(norm=2, fp8=1),
    "silu_mul_quantize_fp8_linear_fp8": _Form(norm=3, fp8=1),
    "linear_fp8_block": _Form(fp8=_BLOCKS),
}


def _row(call: OpCall) -> Tensor:
    return call.tensors["x" if "x" in call.tensors else "gate_up"]


def applies(call: OpCall) -> bool:
    """Whether it is one row of 16 bits, and weights are of as many or of 8, in rows of whole 16-byte pieces."""
    x, weight, y = _row(call), call.tensors["weight"], call.tensors["y"]
    inputs, form = int(weight.shape[1]), _FORMS[call.op]
    narrow = "float8_e4m3fn"
    alike = [call.tensors[n] for n in ("gain", "bias", "residual", "residual_out") if n in call.tensors]
    addressed = [call.tensors[n] for n in ("weight", "gain", *_MOVING) if n in call.tensors]
    return (
        x.shape[0] == 1
        and (x.dtype == narrow if form.blocks else x.dtype in _WIDE)
        and weight.dtype == (narrow if form.fp8 else x.dtype)
        and all(t.dtype == (y if form.blocks else x).dtype for t in alike)
        and y.dtype in (_WIDE if form.blocks else (x.dtype,) if form.fp8 else (x.dtype, "float32"))
        and all(t.alignment % 16 == 0 for t in addressed)
        and inputs * DTYPE_BYTES[weight.dtype] % 16 == 0
        and inputs <= _MOST_INPUTS
        and (not form.norm or int(weight.shape[0]) <= _MOST_OUTPUTS_BEHIND_NORM)
        and call.attrs.get("group", inputs) == inputs
        and call.attrs.get("block", 128) == 128
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
        "FP16": (call.tensors["y"] if form.blocks else _row(call)).dtype == "float16",
    }
    entry = ("gemv_wide" if wide else "gemv", "gemv_fp8", "gemv_fp8_block")[form.fp8]
    launch = DeviceLaunch(
        function=f"csrc/gemv.cu:{entry}",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments={
            **_pointers(call, form),
            "n": Scalar(rows, "int32"),
            **(
                {}
                if form.blocks
                else {k: Scalar(call.attrs.get(k, 0.0), "float32") for k in ("eps", "offset")}
            ),
        },
        grid=(min(call.multiprocessors, rows), 1, 1),
        dependent=True,
        early=tuple(name for name in _FIXED if name in call.tensors),
    )
    seconds = _START + outputs * inputs * DTYPE_BYTES[weight.dtype] / (_STREAMED * call.bandwidth)
    return Candidate("ring", (launch,), seconds=seconds)


def _pointers(call: OpCall, form: _Form) -> dict[str, Pointer]:
    """Operands and results by parameter; what the call lacks, and the kernel leaves alone, is another of 16 bits."""
    row = "x" if "x" in call.tensors else "gate_up"
    other = "y" if form.blocks else row
    names = ("weight", "bias", "y", *(() if form.blocks else ("residual", "gain", "residual_out")))
    found = {name: Pointer(name if name in call.tensors else other) for name in names} | {"x": Pointer(row)}
    scales = ("weight_scale", "x_scale") if form.blocks else ("weight_scale",) if form.fp8 else ()
    return found | {name: Pointer(name) for name in scales}


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
    linear_fp8_block,
):
    assert isinstance(_op, Contract)
    # Chains of 8 bits: a step of Qwen3-8B takes 3.27 ms on one H200, and 3.14 with Triton's products.
    slower = _FORMS[_op.name].fp8 == 1
    cuda_kernel(_op, "gemv", features=("tma", "pdl"), applies=applies, tuned_only=slower)(_gemv)
