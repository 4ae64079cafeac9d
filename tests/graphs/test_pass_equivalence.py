"""Whatever passes run, a program computes the same: interpreted call by call through the references."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from tiny_programs import CONFIGS, Machine, Weights, steps, traced

from makeready.graphs.passes import REWRITES, rewrite
from makeready.graphs.passes.expand import expand
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner.compile import Traced
from makeready.graphs.planner.ir import Program
from makeready.graphs.planner.verify import verify

QUANT = {"fuse_quantize"}  # what applies to quantized programs alone
MODELS = dict.fromkeys(CONFIGS, "") | {"llama-fp8": "fp8"}
CASES = [
    (name, disabled)
    for name, quant in MODELS.items()
    for passes in [sorted(REWRITES.keys() - (set() if quant else QUANT))]
    for count in range(len(passes) + 1)
    for disabled in itertools.combinations(passes, count)
]


@cache
def model(name: str) -> tuple[Traced, Weights]:
    return traced(CONFIGS[name.partition("-")[0]], quant=MODELS[name] or None), Weights()


def run(name: str, programs: dict[str, Program]) -> list[dict[str, torch.Tensor]]:
    """Results of rows that somebody owns, after each of the steps."""
    made, weights = model(name)
    machine = Machine(made, weights)
    results = []
    for phase, step in steps(made):
        owned = step["sample_slot"] != made.limits.null_slot
        results.append({k: v[owned] for k, v in machine.run(programs[phase], step).items()})
    return results


@cache
def general(name: str) -> list[dict[str, torch.Tensor]]:
    """Every step through the program of rows of any length, as it was traced."""
    program = model(name)[0].programs[EXTEND]
    return run(name, {EXTEND: program, DECODE: program})


@pytest.mark.parametrize(("name", "disabled"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_passes_change_nothing(name, disabled):
    programs = {
        phase: rewrite(verify(expand(program), after="expand"), disabled=disabled)
        for phase, program in model(name)[0].programs.items()
    }
    for made, wanted in zip(run(name, programs), general(name), strict=True):
        assert torch.equal(made["tokens"], wanted["tokens"])
        assert torch.equal(made["top_ids"], wanted["top_ids"])
        assert not made["logits"].isnan().any()
        error = (made["logits"] - wanted["logits"]).abs().max() / wanted["logits"].abs().max()
        assert error <= 1e-5


def test_the_interpreter_sees_differences():
    """Steps depend on weights, on the cache and on each other: the comparison above is not of constants."""
    first, second, third, fourth = (r["logits"] for r in general("llama"))
    assert len({tuple(row.tolist()) for r in (first, second, third, fourth) for row in r}) == 10
    made, _ = model("llama")
    machine = Machine(made, Weights(seed=1))
    other = machine.run(made.programs[EXTEND], steps(made)[0][1])["logits"][:3]
    assert (other - first).abs().max() > 0.1 * first.abs().max()
