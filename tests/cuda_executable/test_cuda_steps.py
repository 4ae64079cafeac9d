"""Steps on the fake driver: what is copied when, results that wait for nobody, slots, poison."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from fake_driver import FakeBindings
from plans import dummy, make_plan, tiny

from makeready.graphs.executable.cuda import staging as cuda_staging
from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.plan import memory
from makeready.graphs.plan.spec import Bucket


@pytest.fixture
def loaded():
    bindings = FakeBindings()
    executable = CudaExecutable(tiny(), dummy(), driver=Driver(bindings))
    for recorded in (bindings.calls, bindings.copies, bindings.launched):
        recorded.clear()
    yield executable, bindings
    executable.close()
    bindings.check_released()


def bucket_of(phase: str, largest: bool = True) -> Bucket:
    found = [b for b in tiny().buckets if b.phase == phase]
    return max(found) if largest else min(found)


def make_step(bucket: Bucket, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    fields = tiny().steps[bucket.phase].staged
    return {f.name: random.integers(0, 1000, f.spec.at(bucket.sizes)).astype(f.spec.dtype) for f in fields}


def device(address: int, field, bucket: Bucket) -> np.ndarray:
    """A field on the device."""
    nbytes = field.spec.nbytes(bucket.sizes)
    raw = np.frombuffer(ctypes.string_at(address, nbytes), field.spec.dtype)
    return raw.reshape(field.spec.at(bucket.sizes))


def addresses(executable: CudaExecutable, fields, base: int, bucket: Bucket) -> dict[str, int]:
    found = {}
    for field in fields:
        found[field.name] = base
        base += memory.align(field.spec.nbytes(bucket.sizes))
    return found


def answer(executable: CudaExecutable, bucket: Bucket):
    """A device that adds one to each row's length and calls it the sampled token."""
    steps = {f.name: f for f in executable.plan.steps[bucket.phase].staged}
    places = addresses(executable, steps.values(), executable._regions.step, bucket)

    def run(nodes) -> None:
        context = device(places["query_len"], steps["query_len"], bucket)
        tokens = (context + 1).astype(np.int32)
        ctypes.memmove(executable._regions.result, tokens.ctypes.data, tokens.nbytes)

    return run


@pytest.mark.parametrize("phase", ["decode", "extend", "input_logprobs"])
@pytest.mark.parametrize("largest", [True, False])
def test_a_step_is_one_copy_in_one_launch_and_one_copy_out(loaded, phase, largest):
    executable, bindings = loaded
    bucket = bucket_of(phase, largest)
    step = make_step(bucket)
    seen = {}

    def run(nodes) -> None:
        fields = executable.plan.steps[bucket.phase].staged
        places = addresses(executable, fields, executable._regions.step, bucket)
        for field in fields:
            seen[field.name] = device(places[field.name], field, bucket)

    bindings.on_launch = run
    executable.launch(bucket, step).wait()
    assert [kind for kind, *_ in bindings.copies] == ["in", "out"]
    assert bindings.launched == [executable.plan.buckets.index(bucket)]
    assert [c for c in bindings.calls if c not in ("cuCtxSetCurrent", "cuEventSynchronize")] == [
        "cuMemcpyHtoDAsync",
        "cuGraphLaunch",
        "cuMemcpyDtoHAsync",
        "cuEventRecord",
    ]
    kind = executable.plan.steps[bucket.phase]
    for copy, fields in zip(bindings.copies, (kind.staged, kind.results), strict=False):
        assert copy[3] == memory.layout(fields, bucket.sizes)[1]
    for name, array in step.items():
        assert np.array_equal(seen[name], array), name


def test_a_launch_waits_for_nothing_and_arrays_may_be_reused_at_once(loaded):
    executable, bindings = loaded
    bucket = bucket_of("decode")
    bindings.on_launch = answer(executable, bucket)
    step = make_step(bucket)
    expected, pending = [], []
    for k in range(2):
        step["query_len"][:] = 100 * k + np.arange(bucket.rows)
        expected.append(step["query_len"] + 1)
        pending.append(executable.launch(bucket, step))
    assert "cuEventSynchronize" not in bindings.calls, "the host waited for the device"
    step["query_len"][:] = -1
    for k in (1, 0):
        assert np.array_equal(pending[k].wait()["tokens"], expected[k])


def test_results_outlive_later_steps(loaded):
    executable, bindings = loaded
    bucket = bucket_of("decode")
    bindings.on_launch = answer(executable, bucket)
    pending = []
    for k in range(7):
        step = make_step(bucket)
        step["query_len"][:] = k
        pending.append(executable.launch(bucket, step))
    for k in (3, 6, 0, 5, 1, 2, 4):
        first = pending[k].wait()
        assert (first["tokens"] == k + 1).all()
        assert first is pending[k].wait()
        assert set(first) == {f.name for f in executable.plan.steps[bucket.phase].results}


def test_a_step_of_the_wrong_shape_is_refused(loaded):
    executable, _ = loaded
    bucket = bucket_of("decode")
    step = make_step(bucket)
    step["row_slot"] = step["row_slot"][:1]
    with pytest.raises(AssertionError, match="row_slot is"):
        executable.launch(bucket, step)


def slot_bytes(executable: CudaExecutable) -> dict[str, np.ndarray]:
    fields = executable.plan.slots
    bucket = bucket_of("decode")
    places = addresses(executable, fields, executable._regions.slot, bucket)
    executable._driver.synchronize(executable._stream)
    return {f.name: device(places[f.name], f, bucket) for f in fields}


def test_slots_get_what_is_named_and_defaults(loaded):
    executable, bindings = loaded
    defaults = slot_bytes(executable)
    values = {"temperature": 0.5, "seed": 2**40, "stop_ids": [7, 8], "bias_ids": [3], "bias_values": [-1.5]}
    executable.write_slot(2, values)
    table = slot_bytes(executable)
    assert table["temperature"].tolist() == [0, 0, 0.5, 0, 0]
    assert table["seed"][2] == 2**40
    assert table["stop_ids"][2].tolist() == [7, 8] + [-1] * 14
    assert table["bias_ids"][2, :2].tolist() == [3, -1]
    assert table["bias_values"][2, :2].tolist() == [-1.5, 0]
    assert len(bindings.copies) == 5, "only what changed is sent"
    executable.write_slot(2, values)
    assert len(bindings.copies) == 5
    executable.write_slot(2, {"top_k": 4})
    table = slot_bytes(executable)
    assert table["top_k"].tolist() == [0, 0, 4, 0, 0]
    for name, array in defaults.items():
        if name != "top_k":
            assert np.array_equal(table[name], array), name
    with pytest.raises(AssertionError, match="slots have no field"):
        executable.write_slot(0, {"historic": [1]})


@pytest.mark.parametrize("name", ["history", "pages"])
def test_the_host_writes_the_beginning_of_what_the_device_keeps(loaded, name):
    executable, bindings = loaded
    before = slot_bytes(executable)[name]
    tokens = np.arange(1, 1 + before.shape[1], dtype=np.int32)
    executable.write_slot(1, {name: tokens[:3].tolist()})
    executable.write_slot(3, {name: tokens})
    assert len(bindings.copies) == 2
    after = slot_bytes(executable)[name]
    assert after[1].tolist() == [1, 2, 3, *before[1, 3:]]
    assert np.array_equal(after[3], tokens)
    assert np.array_equal(after[[0, 2, 4]], before[[0, 2, 4]])


def test_a_long_history_goes_in_pieces(loaded, monkeypatch):
    """The driver keeps its own copy of little only; what is sent may be freed at once."""
    executable, bindings = loaded
    monkeypatch.setattr(cuda_staging, "_MOST_SENT", 16)
    executable.write_slot(2, {"history": np.arange(10, 20)})
    assert len(bindings.copies) == 3
    assert slot_bytes(executable)["history"][2, :10].tolist() == list(range(10, 20))


def test_slots_change_in_the_order_of_steps(loaded):
    executable, bindings = loaded
    bucket = bucket_of("decode")
    place = addresses(executable, executable.plan.slots, executable._regions.slot, bucket)
    field = next(f for f in executable.plan.slots if f.name == "top_k")
    seen = []
    bindings.on_launch = lambda nodes: seen.append(device(place["top_k"], field, bucket)[1])
    for k in (5, 6, 7):
        executable.write_slot(1, {"top_k": k})
        executable.launch(bucket, make_step(bucket))
    executable.launch(bucket, make_step(bucket)).wait()
    assert seen == [5, 6, 7, 7]


def test_poison_fills_arena_results_and_the_null_page(loaded):
    executable, bindings = loaded
    executable.poison()
    executable._driver.synchronize(executable._stream)
    plan, regions = executable.plan, executable._regions
    assert (bindings.allocations[regions.arena] == 0xFF).all()
    io = bindings.allocations[regions.io]
    assert (io[memory.align(plan.memory.step) :] == 0xFF).all()
    kv = bindings.allocations[regions.kv]
    start = 0
    for part in plan.kv.parts:
        assert (kv[start : start + part.page_bytes] == 0xFF).all()
        assert not kv[start + part.page_bytes : start + executable.pages * part.page_bytes].any()
        start += memory.align(executable.pages * part.page_bytes)


def test_operands_are_read_back_as_float32():
    bindings = FakeBindings()
    plan = make_plan(disabled_passes=("fuse_qkv", "fuse_silu_mul"))  # which leaves columns of wider buffers
    executable = CudaExecutable(plan, dummy(), driver=Driver(bindings))
    bucket = bucket_of("extend")
    program = executable.plan.programs["extend"]
    random = np.random.default_rng(0)
    arena = bindings.allocations[executable._regions.arena]
    arena[:] = np.frombuffer(random.integers(0, 0x3F80, len(arena) // 2, np.uint16).tobytes(), np.uint8)
    checked = set()
    firsts = {launch.op: launch for launch in reversed(program.launches)}
    for launch in firsts.values():
        for name, value in launch.operands.items():
            buffer = program.buffers.get(value)
            if buffer is None or buffer.spec.dtype != "bfloat16":
                continue
            rows, columns = buffer.spec.at(bucket.sizes)
            stride = buffer.row_stride or columns
            words = arena[buffer.offset :].view(np.uint16)
            expected = np.stack([words[r * stride : r * stride + columns] for r in range(rows)])
            got = executable.operand(bucket, launch.op, name)
            assert np.array_equal(got, (expected.astype(np.uint32) << 16).view(np.float32))
            checked.add(buffer.row_stride is None)
    assert checked == {True, False}, "dense buffers and columns of wider ones"
    executable.close()


def test_an_executable_that_is_dropped_gives_everything_back():
    bindings = FakeBindings()
    executable = CudaExecutable(tiny(), dummy(), driver=Driver(bindings))
    executable.launch(bucket_of("decode"), make_step(bucket_of("decode")))
    del executable
    gc.collect()
    bindings.check_released()


@pytest.mark.parametrize("phase", ["decode", "extend"])
def test_a_step_that_is_cut_samples_when_masks_are_there(loaded, phase):
    """What comes before the cut is launched at once; masks are copied and the rest launched when the step goes on."""
    executable, bindings = loaded
    bucket, plan = bucket_of(phase), executable.plan
    nodes = []
    bindings.on_launch = lambda launched: nodes.append(list(launched))
    executable.launch(bucket, make_step(bucket)).wait()
    whole = nodes.pop()

    executable.launch(bucket, make_step(bucket), cut=True)
    executable.resume({})
    executable.launch(bucket, make_step(bucket)).wait()
    assert [len(part) for part in nodes] == [len(nodes[0]), len(whole) - len(nodes[0]), len(whole)]
    nodes.clear()
    bindings.calls.clear()
    words = np.arange(1, plan.limits.mask_words + 1, dtype=np.int32)
    pending = executable.launch(bucket, make_step(bucket), cut=True)
    executable.resume({2: {"allowed": words}, 0: {"allowed": words[:1]}})
    assert [call for call in bindings.calls if call not in ("cuCtxSetCurrent", "cuEventSynchronize")] == [
        *("cuMemcpyHtoDAsync", "cuGraphLaunch"),
        *("cuMemcpyHtoDAsync", "cuMemcpyHtoDAsync", "cuGraphLaunch"),
        *("cuMemcpyDtoHAsync", "cuEventRecord"),
    ], "graphs are made once"
    pending.wait()
    head, tail = nodes
    assert [(n.function, n.parameters) for n in head + tail] == [(n.function, n.parameters) for n in whole]
    cut = [launch.op for launch in plan.programs[phase].launches[plan.cut(phase) :]]
    assert cut == ["sample", "token_logprobs"]
    table = slot_bytes(executable)["allowed"]
    assert np.array_equal(table[2], words)
    assert table[0, 0] == 1
    assert not table[[1, 3]].any()


def test_drafts_of_a_step_that_is_cut_come_before_the_model_has_run():
    """They are copied behind the first of three graphs, and waited for by an event of their own."""
    bindings, plan = FakeBindings(), make_plan(speculative={"method": "ngram", "num_draft_tokens": 3})
    executable = CudaExecutable(plan, dummy(), driver=Driver(bindings))
    bucket, step = Bucket("verify", 4, 16), plan.steps["verify"]
    places = addresses(executable, step.results, executable._regions.result, bucket)
    wanted = {"draft_ids": np.arange(16, dtype=np.int32), "draft_len": np.array([3, 1, 4, 1], np.int32)}
    seen: list[int] = []

    def run(nodes) -> None:
        seen.append(len(list(nodes)))
        for name, values in wanted.items():
            own = values if len(seen) == 1 else values + 100  # what comes later must not be seen
            ctypes.memmove(places[name], own.ctypes.data, own.nbytes)

    bindings.on_launch = run
    staged = {f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in step.staged}
    bindings.calls.clear()
    pending = executable.launch(bucket, staged, cut=True)
    calls = [
        call for call in bindings.calls if call in ("cuGraphLaunch", "cuMemcpyDtoHAsync", "cuEventRecord")
    ]
    assert calls == [
        "cuGraphLaunch",
        "cuMemcpyDtoHAsync",
        "cuMemcpyDtoHAsync",
        "cuEventRecord",
        "cuGraphLaunch",
    ]
    early = pending.early()
    assert set(early) == set(wanted)
    for name, values in wanted.items():
        assert np.array_equal(early[name], values)
    executable.resume({})
    assert np.array_equal(pending.wait()["draft_len"], wanted["draft_len"] + 100)
    early_at, cut, launches = plan.early("verify"), plan.cut("verify"), plan.programs["verify"].launches
    assert [launch.op for launch in launches[:early_at]] == ["draft_ngram"]
    assert [launch.op for launch in launches[cut:]] == ["sample", "token_logprobs", "accept_drafts"]
    assert len(seen) == 3
    executable.close()
    bindings.check_released()


def test_a_step_that_was_left_at_its_cut_is_finished_by_the_next(loaded):
    executable, bindings = loaded
    bucket, nodes = bucket_of("decode"), []
    bindings.on_launch = lambda launched: nodes.append(len(list(launched)))
    executable.launch(bucket, make_step(bucket), cut=True)
    executable.launch(bucket, make_step(bucket)).wait()
    assert len(nodes) == 3
    assert nodes[0] + nodes[1] == nodes[2]
    executable.resume({})
    assert len(nodes) == 3, "nothing stands at a cut"
