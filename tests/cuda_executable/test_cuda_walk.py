"""Stepping through a program on the fake driver: graphs of parts of it, reading and writing values, poison."""

from __future__ import annotations

import numpy as np
import pytest
from fake_driver import FakeBindings
from plans import dummy, make_plan, tiny

from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.unowned import Held
from makeready.graphs.plan import memory
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import DEVICE, Bucket


@pytest.fixture
def loaded():
    bindings = FakeBindings()
    executable = CudaExecutable(tiny(), dummy(), driver=Driver(bindings))
    yield executable, bindings
    executable.close()
    bindings.check_released()


def step_of(plan: Plan, bucket: Bucket) -> dict[str, np.ndarray]:
    fields = plan.steps[bucket.phase].staged
    return {f.name: np.full(f.spec.at(bucket.sizes), 7, f.spec.dtype) for f in fields}


def test_a_walk_runs_every_node_of_the_whole_graph_once_and_in_order(loaded):
    executable, bindings = loaded
    bucket = executable.plan.buckets[-1]
    (whole,) = bindings.graphs[executable.plan.buckets.index(bucket) :][:1]
    ran: list = []
    bindings.on_launch = ran.extend
    count = len(executable.plan.programs[bucket.phase].launches)
    assert list(executable.walk(bucket, step_of(executable.plan, bucket))) == list(range(1, count + 1))
    assert [(n.function.name, n.grid, n.parameters) for n in ran] == [
        (n.function.name, n.grid, n.parameters) for n in whole
    ]


def test_launches_between_two_stops_are_one_graph(loaded):
    executable, bindings = loaded
    bucket = executable.plan.buckets[0]
    made = len(bindings.graphs)
    reached = []
    for done in executable.walk(bucket, step_of(executable.plan, bucket), stops=(3, 5)):
        reached.append((done, len(bindings.launched)))
    assert reached == [(3, 1), (5, 2)]
    first, second = bindings.graphs[made:]
    names = [node.function.name.split("_")[0] for node in (*first, *second)]
    wanted = [launch.op.split("_")[0] for launch in executable.plan.programs[bucket.phase].launches[:5]]
    assert list(dict.fromkeys(names)) == list(dict.fromkeys(wanted))
    assert first[0].after is None
    assert second[0].after is None


def test_a_step_after_a_walk_is_an_ordinary_one(loaded):
    executable, _ = loaded
    bucket = executable.plan.buckets[0]
    step = step_of(executable.plan, bucket)
    before = executable.launch(bucket, step)
    for _ in executable.walk(bucket, step):
        break  # a walk may be left early
    assert set(before.wait()) == {f.name for f in executable.plan.steps[bucket.phase].results}
    executable.launch(bucket, step).wait()


def test_values_are_read_and_written_where_they_lie():
    bindings = FakeBindings()
    plan = make_plan(disabled_passes=("fuse_qkv", "fuse_silu_mul"))  # which leaves columns of wider buffers
    executable = CudaExecutable(plan, dummy(), driver=Driver(bindings))
    bucket = max(b for b in plan.buckets if b.phase == "extend")
    arena = bindings.allocations[executable._regions.arena]
    strided = 0
    for name, buffer in plan.programs["extend"].buffers.items():
        if len(buffer.spec.shape) != 2 or buffer.spec.dtype != "bfloat16":
            continue
        rows, columns = buffer.spec.at(bucket.sizes)
        stride = buffer.row_stride or columns
        bits = np.random.default_rng(0).integers(1, 2**15, (rows, columns)).astype(np.uint16)
        arena[:] = 0
        executable.poke(bucket, name, bits)
        expected = np.zeros(len(arena) // 2, np.uint16)
        for row in range(rows):
            at = buffer.offset // 2 + row * stride
            expected[at : at + columns] = bits[row]
        assert np.array_equal(arena.view(np.uint16), expected)
        assert np.array_equal(executable.peek(bucket, name), bits)
        strided += stride != columns
    assert strided
    executable.close()


def test_poison_spares_exactly_what_sequences_hold(loaded):
    executable, bindings = loaded
    plan, regions = executable.plan, executable._regions
    size, null = plan.limits.page_size, plan.limits.null_slot
    executable.write_slot(1, {"pages": [3, 2], "history": range(1, 21), "temperature": 0.5})
    driver, stream = executable._driver, executable._stream
    kv = bindings.allocations[regions.kv]
    kv[:] = 1
    executable.poison([Held(1, (3, 2), size + 4)])
    driver.synchronize(stream)
    start = 0
    for part in plan.kv.parts:
        pages = kv[start : start + executable.pages * part.page_bytes].reshape(executable.pages, size, -1)
        kept = np.zeros((executable.pages, size), bool)
        kept[3], kept[2, :4] = True, True
        assert (pages[kept] == 1).all()
        assert (pages[~kept] == 0xFF).all()
        start += memory.align(executable.pages * part.page_bytes)
    bucket = plan.buckets[0]
    for field in plan.slots:
        table = executable.peek(bucket, field.name)
        assert (np.delete(table, 1, 0).view(np.uint8) == 0xFF).all(), field.name
        if field.keeper != DEVICE:
            value = 0.5 if field.name == "temperature" else field.default
            assert table[1].tobytes() == np.full(table[1].shape, value, field.spec.dtype).tobytes(), (
                field.name
            )
    assert executable.peek(bucket, "pages")[1].view(np.int32).tolist() == [3, 2, -1, -1]
    assert executable.peek(bucket, "history")[1, :22].view(np.int32).tolist() == [*range(1, 21), 0, -1]
    executable.write_slot(null, {})  # whatever the host thinks that the device has
    executable.write_slot(0, {"top_k": 4})
    assert executable.peek(bucket, "temperature").view(np.float32)[[0, null]].tolist() == [0, 0]
    assert executable.peek(bucket, "top_k").view(np.int32)[0] == 4
