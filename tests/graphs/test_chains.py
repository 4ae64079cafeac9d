"""Launches that may run as one: which those are, where their values lie, and what a bucket runs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from tiny_programs import LLAMA, QWEN2, dummy, traced

from makeready.graphs.executable.bisect import as_references
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.example import Row, example_step
from makeready.graphs.plan.check_cuda import check_chains
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import (
    APART,
    Chain,
    Launch,
    LoweredProgram,
    Node,
    OpClass,
    PlanCandidate,
    tuned_key,
)
from makeready.graphs.plan.rules import ContradictionError
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket
from makeready.graphs.planner.chains import find_chains
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.planner.cuda.edges import joins
from makeready.graphs.planner.lower import lower
from makeready.kernels.contract import CONTRACTS

GATED, NORMED, FIRST = "add_rms_norm_linear_silu_mul", "add_rms_norm_linear", "rms_norm_linear"
ATTENDED = "norm_rope_kv_write_decode_attention"
ONE, MANY = Bucket(DECODE, 1, 1), Bucket(DECODE, 4, 4)


def lowered(*, chained: bool = True) -> LoweredProgram:
    """A decode program of two layers."""
    made = traced(LLAMA).lower()
    return lower(made.programs[DECODE], made.traced.target, MANY, {}, chained=chained)[0]


def places(program: LoweredProgram, values: Sequence[str]) -> list[tuple[str, int, int]]:
    buffers = [(v, program.buffers[v]) for v in dict.fromkeys(values) if v in program.buffers]
    return [(v, b.offset, b.offset + b.spec.nbytes(MANY.sizes)) for v, b in buffers]


def test_norms_and_what_they_are_projected_to_are_chains() -> None:
    program = lowered()
    longest = {chain.first: chain for chain in reversed(program.chains)}
    assert [longest[at].launch.op for at in sorted(longest)] == [
        FIRST, ATTENDED, GATED, NORMED, ATTENDED, GATED, NORMED,
    ]  # fmt: skip
    assert {c.launch.op for c in program.chains if c.first == longest[min(longest)].first} == {FIRST}
    gated = next(chain for chain in program.chains if chain.launch.op == GATED)
    at = next(i for i, chain in enumerate(program.chains) if chain is gated)
    assert (program.chains[at + 1].launch.op, program.chains[at + 1].first) == (NORMED, gated.first)
    norm, linear, gate = program.launches[gated.first : gated.stop]
    assert gated.launch.operands == {
        "x": norm.operands["x"],
        "residual": norm.operands["residual"],
        "gain": norm.operands["weight"],
        "weight": linear.operands["weight"],
    }
    assert gated.launch.results == {"y": gate.results["y"], "residual_out": norm.results["residual_out"]}
    assert gated.launch.attrs == {**norm.attrs, "offset": 0.0, "out_dtype": ""}


def test_operands_and_results_of_a_chain_lie_apart() -> None:
    """Its call writes before it has read all. Launch by launch they need not."""
    program = lowered()
    for chain in program.chains:
        names = (*chain.launch.operands.values(), *chain.launch.results.values())
        for (one, start, stop), (other, begin, end) in combinations(places(program, names), 2):
            assert stop <= begin or end <= start, f"{one} and {other} of {chain.launch.op}"
    plain = lowered(chained=False)
    assert not plain.chains
    ends = {name: buffer.last for name, buffer in plain.buffers.items()}
    assert any(program.buffers[name].last > last for name, last in ends.items())


def test_a_chain_gives_what_its_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, by the references: a step over chains beside one over launches."""
    monkeypatch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)
    checkpoint = dummy(QWEN2)  # with biases
    plan = as_references(
        compile_plan(checkpoint, max_rows=2, max_tokens=16, page_size=4, weight_dtype="bfloat16")
    )
    programs = {}
    for phase, program in plan.programs.items():
        chains = find_chains(program.launches, {}, ())
        classes = tuple(OpClass(c.launch.op, {}) for c in chains)
        found = tuple(replace(c, launch=replace(c.launch, op_class=i)) for i, c in enumerate(chains))
        runs = {str(b): (PlanCandidate("one", ()),) for b in plan.buckets if b.phase == phase}
        classes = tuple(replace(one, candidates=runs) for one in classes)
        calls = replace(program, chains=found, classes=classes).calls(plan.buckets[0], {})
        programs[phase] = replace(program, launches=tuple(call.launch for call in calls))
    chained = replace(plan, programs=programs)
    assert any(launch.op == GATED for launch in chained.programs[DECODE].launches)
    seen = [_step_results(p, checkpoint) for p in (plan, chained)]
    for one, other in zip(*seen, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


def _step_results(plan: Plan, checkpoint: Any) -> list[dict[str, np.ndarray]]:
    executable = CpuExecutable(plan, checkpoint, pages=9)
    executable.write_slot(0, {"pages": 1 + np.arange(4), "prompt_len": 5})
    found = []
    for phase, ids, done in ((EXTEND, [3, 1, 4, 1, 5], 0), (DECODE, [9], 5)):
        bucket = next(b for b in plan.buckets if b.phase == phase and b.tokens >= len(ids))
        found.append(executable.launch(bucket, example_step(plan, bucket, [Row(0, ids, done)])).wait())
    return found


def _launches(*calls: tuple[str, dict[str, str], dict[str, str]]) -> list[Launch]:
    attrs = {"add_rms_norm": {"eps": 1e-6}}
    return [Launch(op, "reference", given, made, attrs.get(op, {})) for op, given, made in calls]


NORM = ("add_rms_norm", {"x": "x", "residual": "r", "weight": "g"}, {"y": "n", "residual_out": "s"})
LINEAR = ("linear", {"x": "n", "weight": "w"}, {"y": "p"})
SILU = ("silu_mul", {"gate_up": "p"}, {"y": "z"})


@pytest.mark.parametrize(
    ("launches", "bases", "results", "wanted"),
    [
        (_launches(NORM, LINEAR, SILU), {}, (), [(GATED, 0, 3), (NORMED, 0, 2)]),
        (_launches(NORM, LINEAR, SILU), {}, ("p",), [(NORMED, 0, 2)]),  # the host reads the projection
        (_launches(NORM, LINEAR), {}, ("n",), []),
        (_launches(NORM, LINEAR, ("silu", {"x": "n"}, {"y": "q"})), {}, (), []),  # so does another launch
        (_launches(NORM, LINEAR, ("silu", {"x": "half"}, {"y": "q"})), {"half": "n"}, (), []),  # or a part of it
        (_launches(NORM, ("linear", {"x": "x", "weight": "w"}, {"y": "p"})), {}, (), []),  # of something else
        (_launches(NORM, ("linear", {"x": "n", "weight": "s"}, {"y": "p"})), {}, (), []),  # which the norm makes
        (_launches(NORM, ("silu", {"x": "r"}, {"y": "q"}), LINEAR), {}, (), []),  # no neighbours
    ],
)  # fmt: skip
def test_what_is_a_chain(launches: Any, bases: Any, results: Any, wanted: Any) -> None:
    assert [(c.launch.op, c.first, c.stop) for c in find_chains(launches, bases, results)] == wanted


WRITE = {"qkv": "p", "rows": "a", "kv_slot": "at", "k_cache": "k", "v_cache": "v"}
READ = {"k_cache": "k", "v_cache": "v", "page_table": "t", "context_len": "l"}


def _attended(cache: str, head_dim: int) -> list[Launch]:
    """A row's cache write, and attention over ``cache``."""
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 64}
    write = {**sizes, "eps": 0.0, "offset": 0.0}
    read = {**sizes, "head_dim": head_dim, "scale": 1.0, "window": 0}
    return [
        Launch("norm_rope_kv_write", "reference", WRITE, {"q": "q"}, write),
        Launch("decode_attention", "reference", {**READ, "q": "q", "k_cache": cache}, {"y": "y"}, read),
    ]


def test_a_cache_is_one_operand_of_a_chain() -> None:
    (chain,) = find_chains(_attended("k", 64), {}, ())
    assert chain.launch.operands == {**WRITE, **READ}
    assert chain.launch.results == {"y": "y"}
    assert not find_chains(_attended("another", 64), {}, ())
    assert not find_chains(_attended("k", 32), {}, ())  # attributes of one name are one


def _program() -> LoweredProgram:
    """Norm, projection and gate; the chain of all in the bucket of one row, that of two in both."""
    launches = _launches(NORM, LINEAR, SILU)
    chains = find_chains(launches, {}, ())
    node = PlanCandidate("one", (Node("binary", (1, 1, 1), ()),))
    both = {str(ONE): (node,), str(MANY): (node,)}
    classes = tuple(OpClass(launch.op, both) for launch in launches)
    classes += (
        OpClass(GATED, {str(ONE): (node, PlanCandidate(APART, ())), str(MANY): ()}),
        OpClass(NORMED, both),
    )
    launches = [replace(launch, op_class=i) for i, launch in enumerate(launches)]
    chains = tuple(replace(c, launch=replace(c.launch, op_class=3 + i)) for i, c in enumerate(chains))
    return LoweredProgram(DECODE, tuple(launches), {}, classes, chains=chains)


def test_a_bucket_runs_the_longest_chain_that_it_has_kernels_for() -> None:
    program = _program()

    def runs(bucket: Bucket, tuned: dict[str, str] | None = None, only: slice = slice(None)) -> list[str]:
        return [call.launch.op for call in program.calls(bucket, tuned or {}, only)]

    assert runs(ONE) == [GATED]
    assert runs(MANY) == [NORMED, "silu_mul"]
    assert runs(ONE, {tuned_key(DECODE, 3, ONE): APART}) == [NORMED, "silu_mul"]
    assert runs(ONE, only=slice(0, 2)) == [NORMED]
    assert runs(ONE, only=slice(1, 3)) == ["linear", "silu_mul"]
    assert runs(ONE, only=slice(0, 1)) == ["add_rms_norm"]


def test_what_is_read_early_is_made_before_a_join() -> None:
    program = _program()
    assert joins(program, {}) == ()
    assert joins(program, {1: {"weight"}, 0: {"weight"}}) == ()  # parameters
    assert joins(program, {1: {"x"}}) == (1,)
    assert joins(program, {1: {"x"}, 2: {"gate_up"}}) == (1, 2)
    late = replace(program, launches=(*program.launches, *_launches(("silu", {"x": "s"}, {"y": "q"}))))
    late = replace(late, launches=(*late.launches[:3], replace(late.launches[3], op_class=9)))
    assert joins(late, {9: {"x"}}) == (1,)  # behind who makes it, once for all behind it
    assert joins(late, {9: {"x"}, 2: {"gate_up"}}) == (2,)


@pytest.mark.parametrize(
    ("first", "stop", "sentence"),
    [(0, 1000, "which are none"), (1, 0, "reads what they do not"), (0, -1, "gives what they do not")],
)
def test_plans_whose_chains_are_something_else_are_refused(first: int, stop: int, sentence: str) -> None:
    plan, program = compile_plan(dummy(), max_rows=2, max_tokens=16, page_size=4), lowered()
    check_chains(plan, program, DECODE)
    gated = next(chain for chain in program.chains if chain.launch.op == GATED)
    moved: Chain = replace(gated, first=gated.first + first, stop=gated.stop + stop)
    broken = replace(program, chains=(moved,))
    with pytest.raises(ContradictionError, match=sentence):
        check_chains(plan, broken, DECODE)


def test_what_a_chain_leaves_out_nobody_else_reads() -> None:
    plan, program = compile_plan(dummy(), max_rows=2, max_tokens=16, page_size=4), lowered()
    gated = next(chain for chain in program.chains if chain.launch.op == GATED)
    lost = program.launches[gated.first].results["y"]
    reader = Launch("silu", "reference", {"x": lost}, {"y": "z"}, {})
    with pytest.raises(ContradictionError, match=f"leaves out {lost}"):
        check_chains(plan, replace(program, launches=(*program.launches, reader)), DECODE)


def test_chains_state_the_operands_of_their_ops() -> None:
    for op in (op for op in CONTRACTS.values() if op.chains):
        links = [CONTRACTS[name] for name in op.chains]
        assert (op.rowwise is None) == any(link.rowwise is None for link in links)
        assert op.writes == tuple(dict.fromkeys(name for link in links for name in link.writes))
