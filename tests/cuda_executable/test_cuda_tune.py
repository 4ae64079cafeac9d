"""Tuning on the fake driver, whose clock says what every kernel costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_driver import FakeBindings
from fake_objects import FakeNode
from plans import dummy, make_plan, tiny

from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.example import typical_step
from makeready.graphs.executable.tune import tune
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import tuned_key
from makeready.graphs.plan.spec import DECODE

DEVICE = "Fake GPU"


def load(plan: Plan, bindings: FakeBindings) -> CudaExecutable:
    return CudaExecutable(plan, dummy(), driver=Driver(bindings), kv_bytes=20 * plan.kv.page_bytes)


def milliseconds(nodes: list[FakeNode]) -> float:
    """Second choices are a single node ``..._other``, and faster for linears alone; others gain a hair."""
    total = 0.0
    for node in nodes:
        name = node.function.name
        if name.endswith("_other"):
            total += 0.2 if name.startswith("linear") else 0.99999
        elif not name.endswith("_maps"):
            total += 1.0
    return total


def test_what_is_faster_in_its_place_is_chosen():
    plan, bindings = tiny(), FakeBindings(graph_ms=milliseconds)
    executable = load(plan, bindings)
    told: list[tuple[int, int, str]] = []
    tuned, gains = tune(executable, progress=lambda *told_: told.append(told_))
    executable.close()
    bindings.check_released()

    wanted = {
        tuned_key(bucket.phase, index, bucket): "second"
        for bucket in plan.buckets
        for index, one in enumerate(plan.programs[bucket.phase].classes)
        if one.op.startswith("linear")
    }
    assert tuned.tuned == {DEVICE: wanted}
    assert tuned.digest == plan.digest
    tries = sum(len(plan.programs[bucket.phase].classes) for bucket in plan.buckets)
    assert told[-1] == (tries, tries, "")
    assert [gain.bucket for gain in gains] == list(plan.buckets)
    for gain in gains:
        launches = [launch.op for launch in plan.programs[gain.bucket.phase].launches]
        linears = sum(op.startswith("linear") for op in launches)
        assert gain.before == pytest.approx(len(launches) * 1e-3)
        assert gain.after == pytest.approx((len(launches) - 0.8 * linears) * 1e-3)

    again = FakeBindings()
    load(tuned, again).close()
    for graph in again.graphs[: len(plan.buckets)]:
        names = [node.function.name for node in graph]
        assert all(name.endswith("_other") == name.startswith("linear") for name in names)


def test_choices_that_spoil_each_other_are_not_taken():
    def both_are_worse(nodes: list[FakeNode]) -> float:
        others = {
            node.function.name.partition("_")[0] for node in nodes if node.function.name.endswith("_other")
        }
        return 10 - len(others) if len(others) < 2 else 11

    executable = load(tiny(), FakeBindings(graph_ms=both_are_worse))
    tuned, gains = tune(executable)
    executable.close()
    assert tuned.tuned == {DEVICE: {}}
    assert all(gain.before == gain.after for gain in gains)


def test_a_table_of_another_device_is_kept():
    plan = replace(tiny(), tuned={"Other": {"decode/0/decode-1": "second"}})
    executable = load(plan, FakeBindings())
    assert tune(executable)[0].tuned == {**plan.tuned, DEVICE: {}}
    executable.close()


def test_a_plan_with_one_way_has_nothing_to_tune():
    def first(plan: Plan) -> Plan:
        programs = {}
        for phase, program in plan.programs.items():
            classes = tuple(
                replace(one, candidates={b: choices[:1] for b, choices in one.candidates.items()})
                for one in program.classes
            )
            programs[phase] = replace(program, classes=classes)
        return replace(plan, programs=programs)

    executable = load(first(tiny()), FakeBindings())
    with pytest.raises(PlanError, match=r"one way to run each call; compile it with plan.candidates=4"):
        tune(executable)
    executable.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_cache_is_filled_with_numbers_of_moderate_size(dtype):
    plan, bindings = make_plan(kv_dtype=dtype), FakeBindings()
    executable = load(plan, bindings)
    executable.fill_cache()
    region = bindings.allocations[executable._regions.kv]
    for part in plan.kv.parts:
        start = executable._lasting[part.name] - executable._regions.kv
        bits = region[start : start + executable.pages * part.page_bytes].view(np.uint16)
        wide = bits.view(np.float16).astype(np.float32)
        if dtype == "bfloat16":
            wide = (bits.astype(np.uint32) << 16).view(np.float32)
        assert 0.5 <= np.abs(wide).min() < 0.51
        assert 1.9 < np.abs(wide).max() < 2
        assert abs(np.sign(wide).mean()) < 0.1
    executable.close()


class Slots:
    """Remembers the pages of every slot."""

    def __init__(self, pages: int) -> None:
        self.plan, self.pages = tiny(), pages
        self.held: dict[int, list[int]] = {}

    def write_slot(self, slot, values):
        self.held[slot] = values["pages"].tolist()


def test_a_typical_step_reads_and_writes_pages_of_its_own():
    plan = tiny()
    for bucket in plan.buckets:
        slots = Slots(17)
        step = typical_step(slots, bucket, context=40)  # pyright: ignore[reportArgumentType]
        assert {name: array.shape for name, array in step.items()} == {
            f.name: f.spec.at(bucket.sizes) for f in plan.steps[bucket.phase].staged
        }
        rows = bucket.rows if bucket.phase == DECODE else 1
        last = 40 if bucket.phase == DECODE else bucket.tokens
        assert (step["row_start"][:rows] + step["query_len"][:rows] == last).all()
        assert step["query_len"].sum() == bucket.tokens
        for slot in step["row_slot"][:rows].tolist():
            held = slots.held[slot]
            assert len(held) == -(-last // plan.limits.page_size)
            assert all(0 < page < 17 for page in held)
            assert len(set(held)) == len(held)
