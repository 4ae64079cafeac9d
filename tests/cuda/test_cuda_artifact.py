"""Plans with machine code on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import small_programs

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.program import tuned_key
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.planner.cuda.table import resource_table

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A CPU plan that carries the small programs and their kernels."""
    small_programs.register(monkeypatch)
    monkeypatch.setattr(artifact, "check_plan", lambda plan: plan)  # its programs are no model's
    made = small_programs.emitted(tmp_path / "cache", keep=2)
    plan = compile_plan(DummyCheckpoint(TINY), target="cpu", max_rows=2)
    return replace(
        plan,
        programs=made.programs,
        binaries=made.binaries,
        cubins=made.cubins,
        memory=replace(plan.memory, scratch=made.scratch),
    )


def test_a_plan_with_kernels_is_read_as_it_was_written(plan, tmp_path):
    read = artifact.load(artifact.save(plan, tmp_path / "plan"))
    assert read == plan
    assert read.cubins == plan.cubins
    assert artifact.encode(read) == artifact.encode(plan)
    assert {f"kernels/{key}.cubin" for key in plan.binaries} < set(artifact.encode(plan))


def test_choices_that_measured_best_are_kept(plan, tmp_path):
    key = tuned_key("decode", 0, Bucket("decode", 16, 16))
    tuned = replace(plan, tuned={"NVIDIA H100": {key: "tiles/64"}})
    read = artifact.load(artifact.save(tuned, tmp_path / "plan"))
    assert read.tuned == {"NVIDIA H100": {"decode/0/decode-16": "tiles/64"}}
    assert artifact.digest(tuned) == artifact.digest(plan)


def test_measured_choices_are_written_beside_the_plan(plan, tmp_path):
    folder = artifact.save(plan, tmp_path / "plan")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name in ("tiles/64", "tiles/128"):
        tuned = replace(plan, tuned={"NVIDIA H100": {"decode/0/decode-16": name}})
        artifact.save_tuned(tuned, folder)
        assert artifact.load(folder) == tuned
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert after.pop("tuned.json") == artifact.encode(tuned)["tuned.json"]
        assert after == before
    assert {path.name for path in tmp_path.iterdir()} <= {"plan", "cache"}


def test_measured_choices_of_another_plan_are_refused(plan, tmp_path):
    folder = artifact.save(plan, tmp_path / "plan")
    other = replace(plan, architecture="Other", tuned={"NVIDIA H100": {}})
    with pytest.raises(PlanError, match="holds another plan than the one that was measured"):
        artifact.save_tuned(other, folder)
    elsewhere = artifact.save(other, tmp_path / "other")
    (folder / "tuned.json").write_bytes((elsewhere / "tuned.json").read_bytes())
    with pytest.raises(PlanError, match=r"tuned.json is damaged or for another plan; delete it"):
        artifact.load(folder)


def test_damaged_machine_code_is_refused(plan, tmp_path):
    folder = artifact.save(plan, tmp_path / "plan")
    path = sorted((folder / "kernels").iterdir())[0]
    code = bytearray(path.read_bytes())
    code[len(code) // 2] ^= 1
    path.write_bytes(code)
    with pytest.raises(PlanError, match=rf"{path.name}: content does not match its digest"):
        artifact.load(folder)
    path.unlink()
    with pytest.raises(PlanError, match="cannot be read"):
        artifact.load(folder)


def test_other_machine_code_is_another_plan(plan):
    key = next(iter(plan.binaries))
    other = {**plan.binaries, key: replace(plan.binaries[key], sha256="0" * 64)}
    assert artifact.digest(replace(plan, binaries=other)) != artifact.digest(plan)


def test_the_resource_table_names_every_kernel(plan):
    text = resource_table(plan)
    assert all(key in text for key in plan.binaries)
    assert text.splitlines()[0].split() == [
        "kernel", "threads", "registers", "spilled", "shared", "KiB", "code", "KiB", "runs",
    ]  # fmt: skip
    assert f"{len(plan.binaries)} kernels" in text


def test_a_cpu_plan_has_no_machine_code(tmp_path):
    plan = compile_plan(DummyCheckpoint(TINY), target="cpu", max_rows=2)
    assert not plan.binaries
    assert not any("kernel" in name or "binaries" in name for name in artifact.encode(plan))
