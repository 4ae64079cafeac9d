"""Triton kernels of gated delta nets on the GPU against the references in float64, with NaN in all that is nobody's.

python -m pytest tests/gpu/test_gpu_delta.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import delta_inputs
from benchmarks.gpu import launcher
from case import Case, Random
from inputs import cases
from prepared import prepare

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall

registry.discover("cuda")
NEXT = {"key_heads": 16, "key_dim": 128, "value_heads": 32, "value_dim": 128}
ROWS = {"decode": ((1,) * 37, 0), "prompt": ((2000,), 5), "mixed": ((1, 0, 700, 64, 65, 63, 1), 3)}


def large(op: str, label: str, state: str = "float32") -> Case:
    """Qwen3-Next's sizes."""
    random = Random(len(label))
    fields, tokens = delta_inputs.rows_of(*ROWS[label])
    qkv = delta_inputs.of_nobody(random.normal(tokens, 8192, dtype="bfloat16"), fields)
    if op == "causal_conv_silu":
        tail = delta_inputs.blocks_of(random, fields, 3, 8192, dtype="bfloat16")
        return Case(op, label, {"x": qkv, "weight": random.normal(4, 8192), "tail": tail, **fields})
    operands = {
        "qkv": qkv,
        "ba": delta_inputs.of_nobody(random.normal(tokens, 64, scale=2), fields),
        "a_log": random.normal(32),
        "dt_bias": random.normal(32),
        "state": delta_inputs.blocks_of(random, fields, 32, 128, 128, dtype=state),
        **fields,
    }
    return Case(op, label, operands, dict(NEXT), frozenset({"state"} if state != "float32" else ()))


OPS = ("causal_conv_silu", "recurrent_delta_rule", "chunk_delta_rule")


def cases_of(op: str) -> Iterator[Case]:
    """Awkward ones, of the dtypes that activations have."""
    for case in cases(op):
        first = next(iter(case.operands.values()))
        if first.dtype != torch.float32:
            yield case


def case_of(name: str) -> Case:
    op, _, label = name.partition("-")
    if label.endswith("-narrow"):
        return large(op, label.removesuffix("-narrow"), "bfloat16")
    return large(op, label) if label in ROWS else next(c for c in cases_of(op) if c.label == label)


CASES = [f"{op}-{label}" for op in OPS for label in ROWS]
CASES += [f"{op}-{label}-narrow" for op in OPS[1:] for label in ROWS]
CASES += [
    f"{op}-{case.label}" for op in (*OPS, "gated_head_rms_norm", "sigmoid_mul") for case in cases_of(op)
]


def every(call: OpCall) -> list[Candidate]:
    """All ways, of deterministic plans too."""
    calls = (call, replace(call, invariant=True, most_rows=call.rows))
    found = [way for c in calls for kernel in registry.cuda_kernels(call.op) for way in kernel.candidates(c)]
    return list({str(way.launches): way for way in found}.values())


def ways(call: OpCall) -> list[Candidate]:
    """All that find the resources which they need."""
    return [way for way in every(call) if launcher.fits(way, call)]


def operands(case: Case) -> dict[str, torch.Tensor]:
    """On the GPU; what is columns of something wider stays such."""
    return {
        k: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
        for k, x in case.operands.items()
    }


@pytest.fixture(scope="module")
def kernels() -> None:
    """Everything compiled on all cores, which takes minutes one after the other."""

    def work() -> Iterator[tuple[OpCall, list[Candidate]]]:
        for name in CASES:
            case = case_of(name)
            call = launcher.op_call(CONTRACTS[case.op], operands(case), case.attrs)
            yield call, every(call)

    prepare(work())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("kernels")
def test_against_the_reference(name: str) -> None:
    """Results of tokens that are somebody's, and what is written, by norm; twice the same bits."""
    case = case_of(name)
    contract, placed = case.contract, operands(case)
    call = launcher.op_call(contract, placed, case.attrs)
    wanted = case.widened().run()
    mine = delta_inputs.owned(case)
    found = ways(call)
    assert found
    for way in found:
        first, second = (
            launcher.run(way, call, {k: v.clone() if k in contract.writes else v for k, v in placed.items()})
            for _ in range(2)
        )
        for result, want in ((name, made.double()) for name, made in wanted.items()):
            where = f"{case.op}/{way.name}: {result}"
            got, again = (run[result].cpu().contiguous() for run in (first, second))
            if result not in contract.writes:
                got, again, want = got[mine], again[mine], want[mine]
            assert torch.equal(got.view(torch.uint8), again.view(torch.uint8)), f"{where} differs in two runs"
            assert torch.equal(got.isnan(), want.isnan()), f"{where} has NaN in other places"
            keep = ~want.isnan()
            error = (got.double() - want)[keep].norm() / want[keep].norm().clamp_min(1e-30)
            allowed = getattr(contract.tolerance, str(got.dtype).removeprefix("torch."))
            assert error <= allowed, f"{where} is off by {error:.1e}"
