"""Kernel nodes of every class and bucket, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import small_programs
from small_programs import BUCKETS, TARGET, emitted

from makeready.graphs.plan.codec import canonical, to_json
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import find_target
from makeready.graphs.planner.cuda import pool
from makeready.graphs.planner.cuda.aot import compile_launch, kernel_of
from makeready.graphs.planner.cuda.emit import emit
from makeready.kernels import registry
from makeready.kernels.device import DeviceLaunch, OpCall, Pointer, Scalar, Tensor
from makeready.kernels.elementwise import silu
from makeready.kernels.spec import TensorSpec


@pytest.fixture(autouse=True)
def _small_kernels(monkeypatch):
    small_programs.register(monkeypatch)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def test_calls_alike_but_for_names_share_a_class(cache):
    made = emitted(cache)
    for phase in ("decode", "extend"):
        launches, classes = made.programs[phase].launches, made.programs[phase].classes
        assert [launch.op_class for launch in launches] == [0, 1, 2, 0, 1, 2]
        assert [one.op for one in classes] == ["silu", "silu", "multiply"]
        for one in classes:
            assert list(one.candidates) == [str(b) for b in BUCKETS if b.phase == phase]
    dense, view = (made.programs["extend"].classes[i].candidates["extend-16x64"][0] for i in (0, 1))
    assert dense.nodes[0].binary != view.nodes[0].binary  # another stride is another kernel
    assert dense.nodes[0].grid == (64, 1, 1)
    assert dense.nodes[0].dependent
    assert [a.kind for a in dense.nodes[0].arguments] == ["pointer", "pointer", "scalar"]
    decode = made.programs["decode"].classes[0].candidates["decode-16"][0]
    assert decode.nodes[0].binary == dense.nodes[0].binary  # phases share kernels
    for key, binary in made.binaries.items():
        assert hashlib.sha256(made.cubins[key]).hexdigest() == binary.sha256
        assert binary.registers > 0


def test_sizes_are_those_of_the_bucket(cache):
    """Buffers of ``T*2`` rows and of a row for every four tokens: a block a row, a map of as many rows."""
    for rows, wanted in (("T*2", {"extend-16x64": 128}), ("cdiv(R,4)", {"decode-1": 1, "decode-16": 4})):
        phase = next(iter(wanted)).partition("-")[0]
        program = small_programs.program(phase)
        grown = {
            name: replace(b, spec=TensorSpec((rows, *b.spec.shape[1:]), "bfloat16"))
            for name, b in program.buffers.items()
        }
        programs = {phase: replace(program, buffers=grown)}
        buckets = [b for b in BUCKETS if b.phase == phase]
        made = emit(programs, {phase: {}}, buckets, TARGET, context=1024, keep=2, cache=cache)
        found = made.programs[phase].classes[0].candidates
        assert {bucket: choices[0].nodes[0].grid[0] for bucket, choices in found.items()} == wanted
        maps = {bucket: choices[1].nodes[0].arguments[0] for bucket, choices in found.items()}
        assert {bucket: x.shape for bucket, x in maps.items()} == {b: (n, 256) for b, n in wanted.items()}


@pytest.mark.parametrize("deterministic", [False, True])
def test_load_programs_are_apart_from_steps(cache, monkeypatch, deterministic):
    """Buffers of steps have room behind them, places of load programs the next thread's operands; and what
    makes parameters need not be like what makes tokens.
    """
    seen: set[tuple[int, bool]] = set()

    def watched(call):
        seen.add((call.tokens, call.tensors["x"].spare))
        return small_programs.scale_rows(call)

    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "watched", invariant=True)(watched)
    step, load = (
        replace(program, launches=program.launches[:count])
        for program, count in ((small_programs.program("decode"), 2), (small_programs.program("load.0"), 1))
    )
    emit(
        {"decode": step, "load.0": load},
        {"decode": {}, "load.0": {}},
        (Bucket("decode", 1, 1), Bucket("load.0", 1, 7)),
        TARGET,
        context=1024,
        keep=1,
        cache=cache,
        deterministic=deterministic,
        loads={"load.0"},
    )
    assert seen == {(1, True), (7, False)}


def test_candidates_take_turns_and_are_bounded(cache):
    names = [c.name for c in emitted(cache, keep=9).programs["decode"].classes[0].candidates["decode-1"]]
    assert names == ["rows/one", "tiles/64", "tiles/128"]
    assert len(emitted(cache, keep=2).programs["decode"].classes[0].candidates["decode-1"]) == 2


def test_what_a_kernels_model_expects_is_kept_in_whole_nanoseconds(cache, monkeypatch):
    def expected(call):
        found = small_programs.scale_rows(call)
        return [replace(one, seconds=1.23456789e-6 * call.tokens) for one in found]

    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "expected")(expected)
    found = emitted(cache).programs["decode"].classes
    made = {bucket: choices[0].nanoseconds for bucket, choices in found[0].candidates.items()}
    assert made == {"decode-1": 1235, "decode-16": 19753}
    assert {choices[0].nanoseconds for choices in found[2].candidates.values()} == {0}  # it has no model


def test_tensor_maps_carry_what_encoding_takes(cache):
    choice = emitted(cache, keep=2).programs["extend"].classes[1].candidates["extend-16x64"][1]
    assert choice.name == "tiles/64"
    x = choice.nodes[0].arguments[0]
    assert (x.kind, x.operand, x.shape, x.strides) == ("descriptor", "x", (64, 256), (768, 1))
    assert (x.block, x.swizzle, x.element_type) == ((16, 64), 3, 9)  # 128-byte swizzle, bf16


def test_counters_of_all_calls_lie_before_all_other_scratch(cache):
    made = emitted(cache)
    by_bucket = made.programs["decode"].classes[2].candidates
    for bucket in ("decode-1", "decode-16"):
        counter, partial = by_bucket[bucket][0].nodes[0].arguments[2:]
        assert (counter.kind, counter.offset) == ("scratch", 0)
        assert (partial.kind, partial.offset) == ("scratch", 256 + 256)
    assert made.scratch == 256 + 256 + 1024 * 16


def test_an_op_without_implementation_is_named(cache, monkeypatch):
    monkeypatch.delitem(registry._CUDA_KERNELS, "multiply")
    with pytest.raises(
        PlanError, match="no sm_90a implementation for multiply; for instance multiply in dec"
    ):
        emitted(cache)


def test_features_keep_implementations_from_targets(cache):
    made = emitted(cache, find_target("sm_80"), keep=9)
    assert [c.name for c in made.programs["decode"].classes[0].candidates["decode-1"]] == ["rows/one"]
    assert not made.programs["decode"].classes[0].candidates["decode-1"][0].nodes[0].dependent


@pytest.mark.parametrize("name", ["sm_100a", "sm_120a"])
def test_other_targets(cache, name):
    assert emitted(cache, find_target(name)).binaries


def test_a_dependent_kernel_that_never_waits_is_refused(cache, monkeypatch):
    def careless(call):
        return small_programs.scale_rows(
            call, constants={"STRIDE": call.tensors["x"].row_stride, "C": 256, "PDL": False}
        )

    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "careless")(careless)
    with pytest.raises(PlanError, match=r"silu/careless/one is dependent and never waits .* call gdc_wait"):
        emitted(cache)


def test_too_much_shared_memory_is_refused(cache, monkeypatch):
    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "tiles")(small_programs.copy_tiles)
    with pytest.raises(PlanError, match=r"needs \d+ bytes of shared memory, sm_90a has 1000"):
        emitted(cache, replace(TARGET, shared_bytes=1000))


def test_spills_are_refused_unless_they_are_announced(cache, monkeypatch):
    def spilling(call, local_bytes=0):
        (candidate,) = small_programs.scale_rows(
            call,
            constants={"STRIDE": 0, "C": 32768, "PDL": True},
            num_warps=1,
            local_bytes=local_bytes,
        )
        return [candidate]

    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "spilling")(spilling)
    with pytest.raises(PlanError, match=r"spills: \d+ bytes of local memory a thread, 0 are allowed"):
        emitted(cache)
    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "announced")(lambda call: spilling(call, 1 << 20))
    assert any(binary.spill_bytes for binary in emitted(cache).binaries.values())


def test_the_next_candidate_takes_the_place_of_one_that_does_not_fit(cache, monkeypatch):
    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])

    def ways(call):
        (small,) = small_programs.scale_rows(call)
        (spilling,) = small_programs.scale_rows(
            call, constants={"STRIDE": 0, "C": 32768, "PDL": True}, num_warps=1
        )
        (odd,) = small_programs.scale_rows(call, constants={"STRIDE": 1, "C": 100, "PDL": True})
        return [
            replace(spilling, name="spilling"),
            replace(odd, name="odd"),
            small,
            replace(small, name="two"),
        ]

    registry.cuda_kernel(silu, "rows")(ways)
    for keep, names in ((1, ["rows/one"]), (2, ["rows/one", "rows/two"]), (9, ["rows/one", "rows/two"])):
        made = emitted(cache, keep=keep)
        assert [c.name for c in made.programs["decode"].classes[0].candidates["decode-16"]] == names
        assert not any(binary.spill_bytes for binary in made.binaries.values())
        odd, spilling = made.dropped
        assert odd.endswith("(STRIDE=1, C=100, PDL=True) for compute capability 90 does not compile")
        assert "silu/rows/spilling spills" in spilling


def test_tensor_maps_may_reach_beyond_the_last_row(cache, monkeypatch):
    def generous(call):
        (candidate,) = small_programs.copy_tiles(call)[:1]
        launch = candidate.launches[0]
        x = launch.arguments["x"]
        assert call.tensors["x"].spare
        x = replace(x, shape=(1000, *x.shape[1:]))
        return [replace(candidate, launches=(replace(launch, arguments={**launch.arguments, "x": x}),))]

    assert emitted(cache).arena == 0  # no maps
    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "generous")(generous)
    view = (1 << 21) + 16 + 2 * (999 * 3 * small_programs.WIDTH + small_programs.WIDTH)
    assert view <= emitted(cache).arena < view + 256


def test_parameters_are_checked(cache, monkeypatch):
    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "odd")(lambda call: small_programs.scale_rows(call, constants={"C": 256}))
    with pytest.raises(PlanError, match=r"takes x, y, factor, STRIDE, C, PDL; .* is wrong about PDL, STRIDE"):
        emitted(cache)


def _call(alignment: int) -> OpCall:
    tensors = {name: Tensor((4, 1024), "bfloat16", 1024, alignment) for name in ("x", "y")}
    return OpCall("silu", tensors, {}, {"C": 1024}, 4, 4)


def test_alignment_decides_how_wide_memory_is_read():
    (candidate,) = small_programs.scale_rows(_call(16))
    (launch,) = candidate.launches
    wide, narrow = compile_launch(launch, _call(16)), compile_launch(launch, _call(8))
    assert "ld.global.v" in wide.ptx
    assert "ld.global.v" not in narrow.ptx
    assert kernel_of(launch, _call(16), 90) == kernel_of(launch, _call(256), 90)


def test_scalars_are_specialised_on_divisibility_unless_told_otherwise():
    def kernel(value, **changes):
        launch = DeviceLaunch(
            "small_triton:scale_rows",
            {"C": 256, "PDL": False, "factor": 1.0},
            {"x": Pointer("x"), "y": Pointer("y"), "STRIDE": Scalar(value, "int32", **changes)},
            (1, 1, 1),
        )
        return kernel_of(launch, _call(16), 90)

    assert kernel(512) == kernel(768) != kernel(8) == kernel(1)
    assert kernel(512, specialize=False) == kernel(8)


def test_the_same_bytes_in_another_process_and_folder(cache, tmp_path):
    code = (
        "import pathlib, sys, pytest, small_programs, test_emit\n"
        "small_programs.register(pytest.MonkeyPatch())\n"
        "print(test_emit.fingerprint(small_programs.emitted(pathlib.Path(sys.argv[1]), keep=9)))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "PYTHONHASHSEED": "7",
    }
    text = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "elsewhere")],
        capture_output=True, text=True, check=True, env=environment, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert text.strip() == fingerprint(emitted(cache, keep=9))


def fingerprint(made) -> str:
    """Everything that :func:`emit` gave, as a digest."""
    total = hashlib.sha256(canonical({k: to_json(v) for k, v in made.programs.items()}))
    total.update(canonical({k: to_json(v) for k, v in made.binaries.items()}))
    total.update(json.dumps([(k, v.hex()) for k, v in made.cubins.items()]).encode())
    return total.hexdigest()


def test_compiled_kernels_are_kept_and_checked(tmp_path, monkeypatch):
    seen = []
    first = emitted(tmp_path, progress=lambda done, total: seen.append((done, total)))
    count = len(first.binaries)
    assert seen[0] == (0, count)
    assert seen[-1] == (count, count)
    damaged = next(iter(tmp_path.iterdir()))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    compiled = []
    original = pool.compile_kernel
    monkeypatch.setattr(pool, "compile_kernel", lambda kernel: compiled.append(kernel) or original(kernel))
    assert fingerprint(emitted(tmp_path)) == fingerprint(first)
    assert len(compiled) == 1


def test_worker_processes_give_the_same(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_WORTH_WORKERS", 1)
    assert fingerprint(emitted(tmp_path)) == fingerprint(emitted(cache))


def test_a_worker_reports_what_does_not_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_WORTH_WORKERS", 1)
    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "odd")(
        lambda call: small_programs.scale_rows(call, constants={"STRIDE": 1, "C": 100, "PDL": True})
    )
    with pytest.raises(
        PlanError, match=r"small_triton:scale_rows \(STRIDE=1, C=100, PDL=True\) .* not compile"
    ):
        emitted(tmp_path)
