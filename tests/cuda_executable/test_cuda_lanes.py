"""Two lanes: the graphs that the driver is told of, run on a fake GPU in any order that their edges leave open."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from emulated_driver import Emulator
from fake_driver import FakeBindings
from fake_objects import FakeNode
from plans import CONFIG, make_plan
from test_cuda_walk import step_of

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.bisect import as_references, bisect
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.example import Row, example_step
from makeready.graphs.executable.tune import tune
from makeready.graphs.plan import artifact
from makeready.graphs.plan.check import check_plan
from makeready.graphs.plan.check_lanes import check_lanes
from makeready.graphs.plan.lanes import turns
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import ONE_LANE, Chain, Lane, lanes_key
from makeready.graphs.plan.rules import ContradictionError
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner.compile import compile_plan

DEEPSEEK: dict[str, Any] = CONFIG | {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
QWEN2 = CONFIG | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "moe_intermediate_size": 32,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 96,
}
LATENT = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MODELS = {"deepseek": DEEPSEEK, "qwen2": QWEN2, "latent": LATENT}
PAGES = 9


def weights(name: str) -> Checkpoint:
    return DummyCheckpoint(dict(MODELS[name]), None, 0)


@cache
def plan_of(name: str, *, lanes: bool = True) -> Plan:
    made = make_plan(weights(name), lanes=lanes, max_decode_buckets=2, max_extend_buckets=2, max_tokens=16)
    return check_plan(made)


def loaded(plan: Plan, name: str) -> tuple[CudaExecutable, FakeBindings]:
    bindings = FakeBindings()
    executable = CudaExecutable(
        plan, weights(name), driver=Driver(bindings), kv_bytes=PAGES * plan.kv.page_bytes
    )
    return executable, bindings


SHARED = {  # launches of a decode layer from the fork on, the fork and the join included
    "deepseek": ["add_rms_norm", "linear", "route_and_sort", "grouped_silu_mul", "grouped_linear", "combine",
                 "linear", "silu_mul", "linear", "add"],
    "qwen2": ["linear", "route_and_sort", "grouped_silu_mul", "grouped_linear", "combine",
              "linear", "silu_mul", "linear", "sigmoid_gate", "add"],
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_the_shared_expert_runs_beside_the_routed_ones(name: str) -> None:
    """Edges as they follow from what the layer computes, node by node."""
    plan, ops = plan_of(name), SHARED[name]
    program = plan.programs[DECODE]
    joins = [launch.op == "add" for launch in program.launches]
    layers = [at + 1 - len(ops) for at, here in enumerate(joins) if here]
    assert len(layers) == 2
    executable, bindings = loaded(plan, name)
    (bucket,) = [b for b in plan.buckets if b.phase == DECODE][-1:]
    nodes = bindings.graphs[plan.buckets.index(bucket)]
    ends, begins = _places(nodes)
    side_scratch = executable._regions.scratch + plan.memory.scratch // 2
    for layer in layers:
        assert [launch.op for launch in program.launches[layer : layer + len(ops)]] == ops
        side = range(layer + ops.index("combine") + 1, layer + len(ops) - 1)
        for at in range(layer + 1, layer + len(ops)):
            if at == side[0]:
                behind = [ends[layer]]
            elif at == layer + len(ops) - 1:
                behind = [ends[side[0] - 1], ends[side[-1]]]
            else:
                behind = [ends[at - 1]]
            assert [other for other, _ in nodes[begins[at]].edges] == behind
            if at in (side[0], layer + len(ops) - 1):
                assert {kind for _, kind in nodes[begins[at]].edges} == {"plain"}
            for node in nodes[begins[at] + 1 : ends[at] + 1]:
                scratch = [int.from_bytes(p, "little") for p in node.parameters if len(p) == 8]
                assert any(
                    (word >= side_scratch) == (at in side)
                    for word in scratch
                    if 0 <= word - executable._regions.scratch < plan.memory.scratch
                )
    executable.close()
    bindings.check_released()


def _places(nodes: Sequence[FakeNode]) -> tuple[list[int], list[int]]:
    """Numbers of the last and the first node of each launch: the fake's second nodes are called so."""
    begins = [at for at, node in enumerate(nodes) if not node.function.name.endswith("_maps")]
    return [at - 1 for at in [*begins[1:], len(nodes)]], begins


Pick = Callable[[list[int]], int]


def in_some_order(nodes: Sequence[FakeNode], pick: Pick) -> list[FakeNode]:
    """The nodes in an order that their edges allow, where ``pick`` chooses among those that may run."""
    done: set[int] = set()
    order: list[FakeNode] = []
    while len(order) < len(nodes):
        ready = [
            at
            for at, node in enumerate(nodes)
            if at not in done and done.issuperset(other for other, _ in node.edges)
        ]
        done.add(at := pick(ready))
        order.append(nodes[at])
    return order


def orders() -> Iterator[tuple[str, Pick]]:
    yield "side lane last", min
    yield "side lane first", max
    for seed in range(3):
        yield f"random {seed}", random.Random(seed).choice


def played(executable: Any, plan: Plan) -> list[dict[str, np.ndarray]]:
    """What an extend step, one that goes on, and a decode step give, in an arena that holds NaN before each."""
    random_ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 12)).tolist()
    for slot in range(2):
        executable.write_slot(slot, {"pages": 1 + 4 * slot + np.arange(4), "prompt_len": 9})
    found = []
    for phase, spans in ((EXTEND, ((0, 5), (0, 1))), (EXTEND, ((5, 9), (1, 8))), (DECODE, ((9, 10), (8, 9)))):
        rows = [Row(slot, random_ids[slot][a:b], a) for slot, (a, b) in enumerate(spans)]
        tokens = sum(len(row.ids) for row in rows)
        bucket = min(b for b in plan.buckets if b.phase == phase and b.rows >= 2 and b.tokens >= tokens)
        executable.poison()
        made = executable.launch(bucket, example_step(plan, bucket, rows)).wait()
        found.append({name: np.copy(values) for name, values in made.items()})
    return found


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_same_in_any_order_that_edges_allow(name: str) -> None:
    serial = plan_of(name, lanes=False)
    reference = CpuExecutable(as_references(serial), weights(name), pages=PAGES, interpret=True)
    wanted = played(reference, serial)
    plan = plan_of(name)
    executable, bindings = loaded(plan, name)
    emulator = Emulator(executable)
    seen = set()
    for what, pick in orders():
        ran: list[int] = []

        def run(nodes: list[FakeNode], pick: Pick = pick, ran: list[int] = ran) -> None:
            order = in_some_order(nodes, pick)
            ran += [id(node) for node in order]
            emulator(order)

        bindings.on_launch = run
        for step, (one, other) in enumerate(zip(played(executable, plan), wanted, strict=True)):
            for field, values in one.items():
                assert np.array_equal(values, other[field], equal_nan=True), f"{what}, step {step}: {field}"
        seen.add(tuple(ran))
    assert len(seen) == len(list(orders())), "orders differ"
    executable.close()


@pytest.mark.parametrize("name", ["deepseek", "latent"])
def test_parts_of_a_step_have_the_edges_between_their_own_nodes(name: str) -> None:
    """As a cut or a walk has them: those of the whole step but for edges between the parts."""
    plan = plan_of(name)
    executable, bindings = loaded(plan, name)
    for bucket in (next(b for b in plan.buckets if b.phase == phase) for phase in (DECODE, EXTEND)):
        program, whole = plan.programs[bucket.phase], bindings.graphs[plan.buckets.index(bucket)]
        lane, count = program.lanes[-1], len(program.launches)
        for cut in range(lane.fork, lane.stop + 2):
            made = len(bindings.graphs)
            assert list(executable.walk(bucket, step_of(plan, bucket), stops=(cut, count))) == [cut, count]
            head, tail = bindings.graphs[made:]
            same = [(n.function.name, n.grid, n.parameters) for n in (*head, *tail)]
            assert same == [(n.function.name, n.grid, n.parameters) for n in whole]
            assert [node.edges for node in head] == [node.edges for node in whole[: len(head)]]
            kept = [
                [other - len(head) for other, _ in node.edges if other >= len(head)]
                for node in whole[len(head) :]
            ]
            assert [[other for other, _ in node.edges] for node in tail] == kept
    executable.close()


def test_a_plan_with_lanes_is_read_as_it_was_written(tmp_path: Any) -> None:
    plan = plan_of("deepseek")
    assert artifact.load(plan.save(tmp_path / "plan")) == plan
    assert b"lane" not in b"".join(artifact.encode(plan_of("deepseek", lanes=False)).values())


def changed(plan: Plan, **fields: Any) -> Plan:
    """``plan`` with another decode program."""
    return replace(plan, programs={**plan.programs, DECODE: replace(plan.programs[DECODE], **fields)})


def refused(plan: Plan, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        check_plan(plan)


AT_ONCE = r"decode: launches \d+ \(\w+\) and \d+ \(\w+\) may run at once, and one writes what the other has"


@pytest.mark.parametrize("name", ["deepseek", "qwen2"])
def test_places_that_two_lanes_share_are_refused(name: str) -> None:
    """Every value of the side lane on the place of every one that a launch beside it touches, and at its end."""
    plan = plan_of(name)
    program, sizes = plan.programs[DECODE], plan.steps[DECODE].largest
    lane = program.lanes[0]

    def touched(start: int, stop: int) -> set[str]:
        values = (
            v
            for each in program.launches[start:stop]
            for v in (*each.operands.values(), *each.results.values())
        )
        return {v for v in values if v in program.buffers and program.buffers[v].row_stride is None}

    side, main = touched(lane.first, lane.stop), touched(lane.fork + 1, lane.first)
    tried = 0
    for one, other in itertools.product(side - main, main - side):
        place = program.buffers[other]
        last = place.offset + place.spec.nbytes(sizes) - 1
        for offset in {place.offset, last - last % 4}:
            moved = replace(program.buffers[one], offset=offset)
            if offset + moved.spec.nbytes(sizes) <= plan.memory.arena:
                refused(changed(plan, buffers={**program.buffers, one: moved}), AT_ONCE)
                tried += 1
    assert tried > 10


def test_lanes_that_fork_too_early_or_join_too_late_are_refused() -> None:
    plan = plan_of("deepseek")
    first, second = plan.programs[DECODE].lanes
    for fault in (
        replace(second, fork=second.fork - 1),
        replace(second, first=second.first - 1),
        replace(second, stop=second.stop + 1),
    ):
        refused(changed(plan, lanes=(first, fault)), AT_ONCE)
    for fault in (
        (second, first),
        (first, replace(second, fork=first.stop - 1)),
        (first, replace(second, fork=second.first - 1)),
        (first, replace(second, stop=second.first)),
        (first, replace(second, stop=1000)),
        (replace(first, fork=-1), second),
    ):
        refused(changed(plan, lanes=fault), "the side lane has launches .* which do not fork")


def test_a_missing_edge_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof goes by edges, whoever made them."""
    plan = plan_of("deepseek")
    program = plan.programs[DECODE]
    whole = turns(program, [Chain(launch, at, at + 1) for at, launch in enumerate(program.launches)])
    lane, lost = program.lanes[1], 0
    for at in range(lane.fork + 1, lane.stop + 1):
        for other in whole[at].behind:
            left = [*whole]
            left[at] = left[at]._replace(behind=tuple(n for n in left[at].behind if n != other))
            monkeypatch.setattr("makeready.graphs.plan.check_lanes.turns", lambda *given, left=left: left)
            refused(plan, AT_ONCE)
            lost += 1
    assert lost == lane.stop - lane.fork + 1


def test_scratch_and_chains_of_two_lanes_are_refused() -> None:
    plan = plan_of("deepseek")
    refused(replace(plan, memory=replace(plan.memory, side_scratch=0)), AT_ONCE)
    for half in (256, -256, plan.memory.scratch):
        wrong = replace(plan.memory, side_scratch=half)
        refused(replace(plan, memory=wrong), f"memory.side_scratch is {half}")
    program = plan.programs[DECODE]
    lane = program.lanes[0]
    for first in (lane.first - 1, lane.stop - 1):
        chain = Chain(program.launches[first], first, first + 2)
        with pytest.raises(ContradictionError, match="is in two lanes"):
            check_lanes(plan, replace(program, chains=(chain,)))
    check_lanes(plan, replace(program, chains=(Chain(program.launches[0], lane.first, lane.stop),)))


def test_only_steps_of_a_gpu_have_two_lanes() -> None:
    cpu = compile_plan(weights("deepseek"), max_rows=4, max_tokens=16, context_len=64, lanes=True)
    assert not any(program.lanes for program in cpu.programs.values())
    refused(changed(cpu, lanes=(Lane(0, 2, 3),)), "there are two lanes, which the CPU does not have")
    quantized = make_plan(weights("deepseek"), lanes=True, quant="fp8")
    assert quantized.loading is not None
    first, *others = quantized.loading.programs
    loads = (replace(first, program=replace(first.program, lanes=(Lane(0, 2, 3),))), *others)
    refused(replace(quantized, loading=replace(quantized.loading, programs=loads)), "loading has one")


def test_a_bucket_whose_step_is_faster_in_one_lane_has_one() -> None:
    plan = plan_of("deepseek")

    def milliseconds(nodes: list[FakeNode]) -> float:
        """A join takes time; where steps have many rows, lanes save more than that."""
        joins = sum(len(node.edges) > 1 for node in nodes)
        return 10 + joins * (0.1 if nodes[0].grid[1] == 1 else -0.1)

    bindings = FakeBindings(graph_ms=milliseconds)
    executable = CudaExecutable(plan, weights("deepseek"), driver=Driver(bindings), kv_bytes=2**20)
    tuned, gains = tune(executable)
    executable.close()
    small = [bucket for bucket in plan.buckets if bucket.tokens == 1]
    assert 0 < len(small) < len(plan.buckets)
    assert tuned.tuned == {bindings.name.decode(): {lanes_key(bucket): ONE_LANE for bucket in small}}
    assert [gain.bucket for gain in gains if gain.choices] == small
    executable, bindings = loaded(tuned, "deepseek")
    for bucket, nodes in zip(plan.buckets, bindings.graphs, strict=True):
        behind = [[other for other, _ in node.edges] for node in nodes]
        chain = [[], *([at] for at in range(len(nodes) - 1))]
        assert (behind == chain) == (bucket in small)
    scratch = executable._regions.scratch, plan.memory.side_scratch
    words = {w for node in bindings.graphs[plan.buckets.index(small[0])] for w in node.words()}
    assert not any(sum(scratch) <= word < sum(scratch) + scratch[1] for word in words)
    executable.close()


def test_bisection_walks_both_lanes() -> None:
    """Launch by launch in the program's order; a fault of the side lane is named."""
    plan = plan_of("deepseek")
    first, last = (lane.first + 1 for lane in plan.programs[DECODE].lanes)
    # The fake cannot tell launches of two layers that have the same places: it takes each for the last.
    for fault, wanted in ((None, None), (last, (DECODE, first))):

        def change(bucket: Any, at: int, named: dict[str, torch.Tensor], fault: int | None = fault) -> None:
            if (bucket.phase, at) == (DECODE, fault):
                named["y"][0] *= 1.05

        executable, bindings = loaded(plan, "deepseek")
        bindings.on_launch = Emulator(executable, change)
        reference = CpuExecutable(as_references(plan), weights("deepseek"), pages=PAGES, interpret=True)
        difference = bisect(executable, reference, [3, 1, 4, 1, 5], 3).difference
        found = None if difference is None else (difference.bucket.phase, difference.at)
        assert found == wanted
        executable.close()
