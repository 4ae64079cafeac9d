"""A plan on disk: what is written is read back, reproducible to the byte, and no damage goes unseen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_programs import LLAMA, QWEN3, dummy, traced

from makeready.graphs.checkpoint.base import CheckpointWarning, open_checkpoint
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.match import check_checkpoint
from makeready.graphs.plan import artifact
from makeready.graphs.plan.buckets import Traffic
from makeready.graphs.plan.codec import canonical
from makeready.graphs.plan.plan import SCHEMA, Plan, PlanError
from makeready.graphs.planner.compile import compile_plan

TRAFFIC = Traffic(decode_rows={1: 0.5, 3: 1e-05}, context=17)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return traced(LLAMA, traffic=TRAFFIC).lower().compile()


@pytest.fixture(scope="module")
def saved(plan, tmp_path_factory) -> Path:
    return artifact.save(plan, tmp_path_factory.mktemp("plan") / "x")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_saved_is_loaded(plan, saved, tmp_path):
    loaded = artifact.load(saved)
    assert loaded == plan
    assert (
        artifact.digest(loaded)
        == artifact.digest(plan)
        == json.loads((saved / "plan.json").read_text())["digest"]
    )
    assert artifact.encode(loaded) == artifact.encode(plan)
    assert files(artifact.save(loaded, tmp_path / "again")) == files(saved) == artifact.encode(plan)
    assert set(files(saved)) == {
        "plan.json", "weights.json", "config.json", "programs/decode.json", "programs/extend.json",
    }  # fmt: skip


def test_other_requests_have_other_digests(plan):
    others = [{"max_rows": 3}, {"page_size": 8}, {"kv_dtype": "bfloat16"}, {"disabled_passes": ("fuse_qkv",)}]
    others += [{"context_len": 63}, {"max_decode_buckets": 15}, {"traffic": Traffic(context=18)}]
    digests = [artifact.digest(traced(LLAMA, **{"traffic": TRAFFIC, **o}).lower().compile()) for o in others]
    digests += [artifact.digest(plan), artifact.digest(traced(QWEN3).lower().compile())]
    assert len(set(digests)) == len(digests)


def write_checkpoint(folder: Path, **changes) -> Path:
    """A safetensors folder with one tensor for each that the config implies."""
    folder.mkdir(parents=True)
    config = LLAMA | changes
    (folder / "config.json").write_text(json.dumps(config))
    plan = compile_plan(dummy(config), max_rows=2, weight_dtype="float32")
    sources = {p.source: [stop for _, stop in p.box] for w in plan.weights for p in w.param.pieces}
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in sources.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


COMPILE = """
import sys
from makeready.graphs.plan import artifact
from makeready.graphs.planner.compile import compile_plan
artifact.save(compile_plan(sys.argv[1], max_rows=3, disabled_passes=("fuse_qkv", "hoist_gather")), sys.argv[2])
"""


def test_the_same_request_gives_the_same_bytes_in_any_process(tmp_path):
    """Hash seed, working directory, environment, and where checkpoint and plan lie do not enter."""
    first = write_checkpoint(tmp_path / "one" / "checkpoint")
    second = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(first, second)
    os.utime(second / "model.safetensors", (1, 1))
    runs = []
    for at, (seed, checkpoint) in enumerate((("1", first), ("4711", second))):
        cwd = tmp_path / f"cwd{at}"
        cwd.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": f"UTC{at}", "HOME": str(cwd)}
        where = os.path.relpath(checkpoint, cwd) if at else str(checkpoint)
        command = [sys.executable, "-c", COMPILE, where, f"out{at}/plan"]
        runs.append((subprocess.Popen(command, cwd=cwd, env=environment), cwd / f"out{at}" / "plan"))
    assert [process.wait() for process, _ in runs] == [0, 0]
    one, other = (files(folder) for _, folder in runs)
    assert one == other
    assert not any(str(tmp_path).encode() in data for data in one.values())
    check_checkpoint(artifact.load(runs[0][1]), open_checkpoint(second))


@settings(max_examples=150)
@given(st.data())
def test_every_damaged_byte_is_found(saved, tmp_path_factory, data):
    intact = files(saved)
    name = data.draw(st.sampled_from(sorted(intact)))
    at = data.draw(st.integers(0, len(intact[name]) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != intact[name][at]))
    damaged = bytearray(intact[name])
    damaged[at] = byte
    assert_refused(saved, name, bytes(damaged))


@pytest.mark.parametrize("name", ["plan.json", "weights.json", "config.json", "programs/decode.json"])
def test_damage_that_still_parses_is_found(saved, name):
    intact = files(saved)[name]
    assert_refused(saved, name, intact[:-1] + b" ")
    assert_refused(saved, name, intact + b"\n")
    assert_refused(saved, name, intact.replace(b"\n", b"\t", 1))
    assert_refused(saved, name, intact[: len(intact) // 2])
    assert_refused(saved, name, b"")
    assert_refused(saved, name, b"[]\n")
    assert_refused(saved, name, b"[" * 100_000)


def test_numbers_that_read_the_same_or_as_infinite_are_found(saved):
    intact = files(saved)["plan.json"]
    assert intact.count(b"1e-05") == 1
    assert_refused(saved, "plan.json", intact.replace(b"1e-05", b"1E-05"))
    assert_refused(saved, "plan.json", intact.replace(b"1e-05", b"1e905"))


def assert_refused(folder: Path, name: str, data: bytes) -> None:
    """With ``data`` in place of a file's content the plan does not load, and the error names the file."""
    intact = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    try:
        with pytest.raises(PlanError) as caught:
            artifact.load(folder)
        assert str(folder / name) in str(caught.value)
        assert "compile" in str(caught.value)
    finally:
        (folder / name).write_bytes(intact)


@pytest.mark.parametrize("name", ["plan.json", "weights.json", "config.json", "programs/extend.json"])
def test_a_missing_file_is_named(saved, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / name).unlink()
    with pytest.raises(PlanError, match=name.replace(".", r"\.")):
        artifact.load(folder)


def test_a_folder_without_a_plan_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PlanError, match=r"holds no plan \(no plan\.json\); make one with"):
            artifact.load(folder)


def resealed(folder: Path, change) -> None:
    """Change plan.json and give it the digest of its new content."""
    manifest = json.loads((folder / "plan.json").read_text())
    manifest.pop("digest")
    change(manifest)
    manifest["digest"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / "plan.json").write_bytes(canonical(manifest))


def test_another_schema_is_named(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    resealed(folder, lambda manifest: manifest.update(schema=SCHEMA + 1))
    with pytest.raises(PlanError, match=rf"schema is {SCHEMA + 1}, this version reads {SCHEMA}; compile"):
        artifact.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(colour="red"), "unknown field 'colour'"),
        (lambda m: m.pop("buckets"), "lacks the field 'buckets'"),
        (lambda m: m["limits"].update(max_rows="4"), "limits.max_rows must be int, not str"),
        (
            lambda m: m["kv"]["groups"][0]["parts"][0].update(page_shape=7),
            r"kv.groups\[0\].parts\[0\].page_shape must be a list",
        ),
        (lambda m: m["files"].pop("weights.json"), "lacks the field 'weights'"),
    ],
)
def test_fields_of_another_shape_are_named(saved, tmp_path, change, message):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    resealed(folder, change)
    with pytest.raises(PlanError, match=message):
        artifact.load(folder)


def test_sizes_of_no_axis_of_the_step_are_named(saved, tmp_path):
    """A buffer of ``T*3+1`` rows is read, one of an axis that no bucket has is refused."""

    def resized(dim: str) -> tuple[Path, str]:
        folder = tmp_path / dim
        shutil.copytree(saved, folder)
        path = folder / "programs" / "decode.json"
        program = json.loads(path.read_bytes())
        name = min(program["buffers"])
        program["buffers"][name]["spec"]["shape"][0] = dim
        path.write_bytes(canonical(program))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size

        def stated(manifest: dict) -> None:
            manifest["files"]["programs/decode.json"] = digest
            manifest["sizes"]["programs/decode.json"] = size

        resealed(folder, stated)
        return folder, name

    folder, name = resized("T*3+1")
    assert artifact.load(folder).programs["decode"].buffers[name].spec.at({"T": 5})[0] == 16
    with pytest.raises(
        PlanError, match=r"of decode steps: .* depends on axis Q, which nothing gives a length"
    ):
        artifact.load(resized("Q*2")[0])
    for dim in ("T*R", "3-T"):
        with pytest.raises(PlanError, match=r"programs.decode.buffers.*is no size.*compile the plan again"):
            artifact.load(resized(dim)[0])


def test_a_foreign_folder_is_left_alone(plan, tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(PlanError, match="exists and is no plan; choose another output folder"):
        artifact.save(plan, folder)
    (folder / "plan.json").write_text("{}")  # other programs, too, call a file so
    with pytest.raises(PlanError, match=r"holds thesis\.txt, which is no part of a plan"):
        artifact.save(plan, folder)
    (folder / "deep").mkdir()
    (folder / "thesis.txt").rename(folder / "deep" / "weights.json")
    with pytest.raises(PlanError, match="holds deep, which is no part"):
        artifact.save(plan, folder)
    assert (folder / "deep" / "weights.json").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlanError, match="is no plan"):
        artifact.save(plan, tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "precious"]


def test_an_older_plan_is_replaced_whole(plan, tmp_path):
    folder = tmp_path / "deep" / "x"
    older = traced(QWEN3).lower().compile()
    artifact.save(older, folder)
    (folder / "weights.json").write_text("damaged")
    artifact.save(plan, folder)
    assert artifact.load(folder) == plan
    (tmp_path / "deep" / "empty").mkdir()
    assert artifact.load(artifact.save(plan, tmp_path / "deep" / "empty")) == plan
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["empty", "x"]


def test_a_failed_write_leaves_the_older_plan(plan, tmp_path, monkeypatch):
    folder = artifact.save(plan, tmp_path / "x")
    before = files(folder)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        artifact.save(traced(QWEN3).lower().compile(), folder)
    assert files(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_savers_of_one_folder_do_not_disturb_each_other(plan, tmp_path):
    folder, errors = tmp_path / "x", []

    def save() -> None:
        try:
            for _ in range(5):
                artifact.save(plan, folder)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert artifact.load(folder) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# The checkpoint that a plan is for


def test_the_differing_config_field_is_named(plan):
    check_checkpoint(plan, dummy(LLAMA | {"_name_or_path": "elsewhere", "transformers_version": "9"}))
    for change, message in (
        (
            {"num_hidden_layers": 3},
            "its config has layer_types=|its config has num_hidden_layers=2, dummy has 3",
        ),
        ({"rms_norm_eps": 1e-4}, "its config has rms_norm_eps=1e-06, dummy has 0.0001"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "its config has rope_parameters="),
        ({"head_dim": 16}, "its config has head_dim=8, dummy has 16"),
        ({"brand_new_field": 3}, "its config has brand_new_field=None, dummy has 3"),
    ):
        with pytest.raises(
            PlanError, match=f"^the plan is for another checkpoint: ({message}).*compile a plan"
        ):
            check_checkpoint(plan, dummy(LLAMA | change))


def test_the_differing_tensor_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    plan = compile_plan(folder, max_rows=2)
    check_checkpoint(plan, open_checkpoint(folder))
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    for changed, message in (
        ({down: None}, f"it needs tensor {down}, .* lacks it"),
        ({down: np.zeros((24, 35), np.float32)}, rf"it needs tensor {down}, .* has it as float32\[24, 35\]"),
        ({down: np.zeros((25, 36), np.float32)}, rf"it needs tensor {down}, .* has it as float32\[25, 36\]"),
        ({down: np.zeros((24, 36), np.int8)}, rf"it needs tensor {down}, .* has it as int8\[24, 36\]"),
    ):
        made = {k: v for k, v in (tensors | changed).items() if v is not None}
        save_file(made, folder / "model.safetensors")
        with pytest.raises(PlanError, match=f"^the plan is for another checkpoint: .*{message}"):
            check_checkpoint(plan, open_checkpoint(folder))
    # Which plain dtype a tensor has is the loader's affair, and so is what the plan does not read.
    for accepted in ({down: np.zeros((24, 36), np.float16)}, {"visual.weight": np.zeros(1, np.float32)}):
        save_file(tensors | accepted, folder / "model.safetensors")
        with pytest.warns(CheckpointWarning) if "visual.weight" in accepted else nullcontext():
            check_checkpoint(plan, open_checkpoint(folder))


def test_another_targets_plan_does_not_run_here(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    resealed(folder, lambda manifest: manifest.update(target="sm_90a"))
    with pytest.raises(PlanError, match="target sm_90a"):
        CpuExecutable(artifact.load(folder), dummy(LLAMA), pages=4)


def test_a_plan_of_unknown_kernels_does_not_run_here(plan):
    from dataclasses import replace

    decode = plan.programs["decode"]
    launches = (replace(decode.launches[0], kernel="of_tomorrow"), *decode.launches[1:])
    strange = replace(plan, programs={**plan.programs, "decode": replace(decode, launches=launches)})
    executable = CpuExecutable(strange, dummy(LLAMA), pages=4)
    bucket = next(b for b in plan.buckets if b.phase == "decode")
    with pytest.raises(
        PlanError, match=r"no kernel locate/of_tomorrow for target cpu; compile the plan again"
    ):
        executable.launch(bucket, {})
