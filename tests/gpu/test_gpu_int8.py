"""8-bit integers on the GPU beyond what test_gpu_fp8.py has of them: experts, and rows that are not finite.

python -m pytest tests/gpu/test_gpu_int8.py
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu import launcher
from benchmarks.gpu.ops import candidates
from moe_inputs import gated, grouped_linear_fp8
from prepared import prepare

from makeready.kernels import norm_quantize_triton  # noqa: F401
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm import linear_fp8_triton  # noqa: F401
from makeready.kernels.moe import experts_triton  # noqa: F401

Tensors = dict[str, torch.Tensor]


def on_gpu(tensors: Tensors) -> Tensors:
    return {name: x.cuda() for name, x in tensors.items()}


@pytest.mark.parametrize("op", ["grouped_linear_int8", "grouped_silu_mul_int8"])
def test_experts(op: str) -> None:
    """Every way for awkward sizes and routings, -128 among the weights; scales of nobody are NaN, results zeros."""
    made = grouped_linear_fp8(op) if op == "grouped_linear_int8" else gated(grouped_linear_fp8(op))
    dense = (case for case in made if case.operands["x_scale"].is_contiguous())  # as plans have them
    cases = [case for case in dense if case.attrs["out_dtype"] == "float32"]
    calls = []
    for case in cases:
        case.operands["weight"][:, 0] = -128
        tensors = on_gpu(dict(case.operands))
        calls.append((case, tensors, launcher.op_call(CONTRACTS[op], tensors, case.attrs)))
    prepare([(call, candidates(call)) for _, _, call in calls])
    for case, tensors, call in calls:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in case.operands.items()}
        want = CONTRACTS[op].reference(**wide, **case.attrs | {"out_dtype": "float64"})
        # Rows of odd lengths are read byte by byte, and large tiles spill.
        fitting = [way for way in candidates(call) if launcher.fits(way, call)]
        assert fitting, case.label
        for way in fitting:
            first, second = (launcher.run(way, call, tensors)["y"].cpu() for _ in range(2))
            assert torch.equal(first, second), f"{way.name} differs between two runs"
            assert not first[int(case.operands["start"][-1]) :].any()
            error = (first.double() - want).norm() / want.norm().clamp_min(1e-30)
            assert error <= 1e-6, f"{way.name} of {case.label} is off by {error:.1e}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [96, 4096, 12288])
def test_rows_that_are_not_finite_have_no_finite_result(width: int, bad: float) -> None:
    x = torch.randn(5, width, device="cuda").bfloat16()
    x[2, width - 3] = bad
    scale, weight = torch.full((1,), 0.02, device="cuda"), torch.ones(width, device="cuda")
    for op, more, attrs in (
        ("quantize_int8", {}, {"group": width}),
        ("quantize_int8_static", {"scale": scale}, {}),
        ("rms_norm_quantize_int8", {"weight": weight}, {"group": width, "eps": 1e-6, "offset": 0.0}),
    ):
        tensors = {"x": x, **more}
        call = launcher.op_call(CONTRACTS[op], tensors, attrs)
        own = CONTRACTS[op].outputs[1].name
        for way in candidates(call):
            made = launcher.run(way, call, tensors)
            assert made[own][:, 0].isfinite().tolist() == [True, True, False, True, True], op
            operands = {"x": made["q"], "x_scale": made[own]}
            operands |= {"weight": torch.zeros(64, width, dtype=torch.int8, device="cuda")}
            operands |= {"weight_scale": torch.ones(64, device="cuda")}
            product = launcher.op_call(CONTRACTS["linear_int8"], operands, {"out_dtype": "bfloat16"})
            y = launcher.run(candidates(product)[0], product, operands)["y"]
            assert not y[2].isfinite().any()
            assert y[[0, 1, 3, 4]].isfinite().all()
