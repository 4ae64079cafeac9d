"""What the CUDA executable tells the driver when it loads a plan: nodes, edges, addresses, tensor maps."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from fake_driver import FakeBindings
from plans import argument_sizes, chained, dummy, tiny
from test_cuda_walk import step_of

from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.cuda.graph import _shape
from makeready.graphs.plan import memory
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import APART, NodeArgument, tuned_key
from makeready.graphs.plan.spec import Bucket
from makeready.kernels.spec import DTYPE_BYTES, PAGES


def load(plan: Plan, bindings: FakeBindings, **options) -> CudaExecutable:
    return CudaExecutable(plan, dummy(), driver=Driver(bindings), **options)


@pytest.fixture(scope="module")
def loaded():
    bindings = FakeBindings()
    executable = load(tiny(), bindings, kv_bytes=20 * tiny().kv.page_bytes)
    yield executable, bindings
    executable.close()
    bindings.check_released()


def test_maps_may_be_as_long_as_a_multiple_of_the_pages():
    argument = NodeArgument("descriptor", shape=("P*16", "P", "cdiv(P,2)", 8), strides=(8, 8, 8, 1))
    assert _shape(argument, 5) == [80, 5, 3, 8]


def chosen(plan: Plan, bucket: Bucket):
    """(launch, node) of a bucket in order, as the plan's first choices have them."""
    program = plan.programs[bucket.phase]
    for launch in program.launches:
        for node in program.classes[launch.op_class].candidates[str(bucket)][0].nodes:
            yield launch, node


def regions(executable: CudaExecutable, bindings: FakeBindings) -> dict[str, tuple[int, int]]:
    """Address and bytes of every allocation, by the plan's sizes: they are all different."""
    plan = executable.plan
    step = memory.align(plan.memory.step)
    kv = sum(memory.align(p.spec.nbytes({PAGES: executable.pages})) for p in plan.kv.parts)
    wanted = {
        "weights": plan.memory.weights,
        "arena": plan.memory.arena,
        "io": step + plan.memory.result,
        "slot": plan.memory.slot,
        "scratch": plan.memory.scratch,
        "kv": kv,
    }
    found = {len(array): address for address, array in bindings.allocations.items()}
    assert len(set(wanted.values())) == len(wanted) == len(found)
    return {name: (found[nbytes], nbytes) for name, nbytes in wanted.items()}


def expected_address(
    executable: CudaExecutable, places: dict[str, tuple[int, int]], bucket: Bucket, value: str
) -> tuple[str, int]:
    """Region and address of a value, worked out from the plan alone."""
    plan = executable.plan
    buffer = plan.programs[bucket.phase].buffers.get(value)
    if buffer is not None:
        return "arena", places["arena"][0] + buffer.offset
    for weight in plan.weights:
        if weight.param.name == value:
            return "weights", places["weights"][0] + weight.offset
    start = places["kv"][0]
    for part in plan.kv.parts:
        if part.name == value:
            return "kv", start
        start += memory.align(part.page_bytes * executable.pages)
    step = memory.align(plan.memory.step)
    for region, base, fields in (
        ("io", places["io"][0], plan.steps[bucket.phase].staged),
        ("io", places["io"][0] + step, plan.steps[bucket.phase].results),
        ("slot", places["slot"][0], plan.slots),
    ):
        for field in fields:
            if field.name == value:
                return region, base
            base += memory.align(field.spec.nbytes(bucket.sizes))
    raise KeyError(value)


def test_one_graph_a_bucket_with_the_plans_nodes_in_a_chain(loaded):
    executable, bindings = loaded
    plan = executable.plan
    assert len(bindings.graphs) == len(plan.buckets) > 4
    for bucket, nodes in zip(plan.buckets, bindings.graphs, strict=True):
        wanted = [node for _, node in chosen(plan, bucket)]
        assert len(nodes) == len(wanted)
        for at, (node, want) in enumerate(zip(nodes, wanted, strict=True)):
            binary = plan.binaries[want.binary]
            assert node.function.name == binary.function
            assert node.grid == want.grid == (bucket.rows, bucket.tokens, 2)
            assert node.block == (32 * binary.warps, 1, 1)
            assert node.shared == binary.shared
            assert node.after == (at - 1 if at else None)
            assert node.edge == ((None, "programmatic" if want.dependent else "plain")[at > 0])
    edges = {node.edge for nodes in bindings.graphs for node in nodes}
    assert edges == {None, "plain", "programmatic"}


def test_every_pointer_is_where_the_plan_says(loaded):
    executable, bindings = loaded
    plan, places = executable.plan, regions(*loaded)
    seen = set()
    for bucket, nodes in zip(plan.buckets, bindings.graphs, strict=True):
        for (launch, want), node in zip(chosen(plan, bucket), nodes, strict=True):
            names = {**launch.operands, **launch.results}
            parameters = iter(node.parameters)
            for argument in want.arguments:
                taken = [next(parameters) for _ in argument_sizes(argument)]
                if argument.kind == "pointer":
                    value = names[argument.operand]
                    region, address = expected_address(executable, places, bucket, value)
                    assert int.from_bytes(taken[0], "little") == address, (launch.op, value)
                    start, nbytes = places[region]
                    spec = plan.spec(bucket.phase, value)
                    size = 1 if PAGES in spec.shape else spec.nbytes(bucket.sizes)
                    assert start <= address
                    assert address + size <= start + nbytes, (launch.op, value)
                    seen.add(region)
                elif argument.kind == "scratch":
                    assert taken == [struct.pack("<Q", places["scratch"][0] + argument.offset)]
                elif argument.kind == "scalar":
                    form = {"int32": "<i", "int64": "<q", "float32": "<f"}[argument.dtype]
                    assert taken == [struct.pack(form, argument.value)]
            end = [bytes(8)] * (0 if node.function.name.endswith("_source_maps") else 2)
            assert list(parameters) == end, "two null pointers end the parameters of Triton's kernels"
    assert seen == {"weights", "arena", "io", "slot", "kv"}


def test_tensor_maps_are_encoded_innermost_axis_first(loaded):
    executable, bindings = loaded
    plan, places = executable.plan, regions(*loaded)
    over_pages, kinds = 0, set()
    for bucket, nodes in zip(plan.buckets, bindings.graphs, strict=True):
        for (launch, want), node in zip(chosen(plan, bucket), nodes, strict=True):
            parameters = iter(node.parameters)
            for argument in want.arguments:
                taken = [next(parameters) for _ in argument_sizes(argument)]
                if argument.kind not in ("descriptor", "map"):
                    continue
                kinds.add(argument.kind)
                made = bindings.maps[taken[0]]
                shape = [executable.pages if n == PAGES else n for n in argument.shape]
                over_pages += PAGES in argument.shape
                size = DTYPE_BYTES[argument.dtype]
                value = launch.operands[argument.operand]
                assert made.address == expected_address(executable, places, bucket, value)[1]
                assert made.rank == len(shape)
                assert made.shape == shape[::-1]
                assert made.strides == [s * size for s in argument.strides[:-1]][::-1]
                assert made.box == list(argument.block[::-1])
                assert made.element_strides == [1] * len(shape)
                assert made.element_type == 9
                assert made.options == (0, 3, 2, 0)  # 128-byte swizzle and L2 promotion, zeros outside
                sizes = [
                    *(struct.pack("<i", n) for n in shape),
                    *(struct.pack("<q", n) for n in argument.strides),
                ]
                assert taken[1:] == (sizes if argument.kind == "descriptor" else [])
    assert over_pages
    assert kinds == {"descriptor", "map"}
    # The same map serves every bucket: weights and caches do not move.
    assert len({(m.address, tuple(m.box)) for m in bindings.maps.values()}) == len(bindings.maps)


def test_chains_are_one_node_where_a_bucket_has_a_kernel_for_them():
    plan, bindings = chained(), FakeBindings()
    program, device = plan.programs["decode"], bindings.name.decode()
    executable = load(plan, bindings)
    for bucket, nodes in zip(plan.buckets, bindings.graphs, strict=True):
        names = [node.function.name for node in nodes if node.function.name.startswith("chain_")]
        runs = executable.calls(bucket) if bucket.phase == "decode" else []
        if (bucket.phase, bucket.rows) == ("decode", 1):
            assert len(names) == len(program.chains) > 2
            assert len(runs) == len(program.launches) - len(names)
        else:
            assert not names
    bucket = next(b for b in plan.buckets if (b.phase, b.rows) == ("decode", 1))
    stops = list(executable.walk(bucket, step_of(plan, bucket)))
    assert stops == [call.stop for call in executable.calls(bucket)]
    executable.close()
    apart = {tuned_key("decode", c.launch.op_class, bucket): APART for c in program.chains}
    bindings = FakeBindings()
    executable = load(replace(plan, tuned={device: apart}), bindings)
    assert not any(n.function.name.startswith("chain_") for nodes in bindings.graphs for n in nodes)
    executable.close()


def test_what_is_read_early_is_behind_a_plain_edge():
    """The node of the chain that joins, though its kernel waits by itself; of what is behind it where it is cut."""
    plan = chained()
    bucket = next(b for b in plan.buckets if (b.phase, b.rows) == ("decode", 1))
    decode, at = plan.programs["decode"], plan.buckets.index(bucket)
    first, second = decode.chains[:2]
    edges = {}
    for join in (None, first.first, second.first - 1, second.first + 1):
        joins, bindings = () if join is None else (join,), FakeBindings()
        programs = {**plan.programs, "decode": replace(decode, joins=joins)}
        executable = load(replace(plan, programs=programs), bindings)
        edges[join] = {node.function.name: node.edge for node in bindings.graphs[at]}
        executable.close()
    of_first, of_second = (f"chain_{chain.launch.op_class}" for chain in (first, second))
    free = edges[None]
    assert (free[of_first], free[of_second]) == ("programmatic", "programmatic")
    assert edges[first.first] == free | {of_first: "plain"}
    for join in (second.first - 1, second.first + 1):
        assert edges[join][of_second] == "programmatic"


def test_measured_choices_are_taken_on_the_device_they_were_measured_on():
    plan = tiny()
    bucket = plan.buckets[0]
    key = tuned_key(bucket.phase, 0, bucket)
    for device, expected in (("Fake GPU", "_other"), ("Another", "_0")):
        bindings = FakeBindings()
        executable = load(replace(plan, tuned={device: {key: "second"}}), bindings)
        assert bindings.graphs[0][0].function.name.endswith(expected)
        executable.close()


def test_a_bucket_without_kernels_is_refused():
    plan = tiny()
    program = plan.programs["decode"]
    bucket = next(b for b in plan.buckets if b.phase == "decode")
    first = program.classes[0]
    left = {k: v for k, v in first.candidates.items() if k != str(bucket)}
    classes = (replace(first, candidates=left), *program.classes[1:])
    broken = replace(plan, programs={**plan.programs, "decode": replace(program, classes=classes)})
    bindings = FakeBindings()
    with pytest.raises(PlanError, match=f"no kernel for {first.op} in bucket {bucket}"):
        load(broken, bindings)
    bindings.check_released()


def test_scratch_and_cache_start_at_zero_and_slots_at_their_defaults(loaded):
    executable, bindings = loaded
    places = regions(*loaded)
    for region in ("scratch", "kv"):
        assert not bindings.allocations[places[region][0]].any()
    address = places["slot"][0]
    for field in executable.plan.slots:
        raw = bindings.allocations[places["slot"][0]][address - places["slot"][0] :]
        array = raw[: field.spec.nbytes({})].view(field.spec.dtype)
        assert (array == field.default).all(), field.name
        address += memory.align(field.spec.nbytes({}))


def test_dynamic_shared_memory_is_asked_for(loaded):
    _, bindings = loaded
    for nodes in bindings.graphs:
        for node in nodes:
            assert node.function.dynamic_shared == max(node.shared, 48 * 1024)


def test_startup_phases_are_recorded(loaded):
    executable, _ = loaded
    phases = {"imports", "context", "cubins", "memory", "weights", "buffers", "graphs"}
    assert set(executable.startup) == phases
    assert executable.graph_bytes == 0  # the fake's driver takes nothing for itself
    assert all(seconds >= 0 for seconds in executable.startup.values())
