"""Plans that are signed and mean ill: refused in a sentence, and nothing outside of their folder is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_plans import change, seal
from safetensors.numpy import save_file
from tiny_programs import LLAMA, dummy, traced

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.executable import golden
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.plan import artifact
from makeready.graphs.plan.codec import canonical
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.reads import needs

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact.save(traced(LLAMA).lower().compile(), tmp_path_factory.mktemp("plan") / "x")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        CpuExecutable(artifact.load(folder), dummy(LLAMA), pages=4)


def attribute(name: str, **values: Any) -> Callable[[Any], None]:
    def edit(program: Any) -> None:
        for launch in program["launches"]:
            if launch["op"] == name:
                launch["attrs"].update(values)

    return edit


def launch(name: str, part: str, **values: Any) -> Callable[[Any], None]:
    def edit(program: Any) -> None:
        for one in program["launches"]:
            if one["op"] == name:
                one[part].update(values)

    return edit


def at(*path: Any, value: Any) -> Callable[[Any], None]:
    """Set a place of a JSON value; ``value`` may be a function of what is there."""

    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value(content[path[-1]]) if callable(value) else value

    return edit


def cached(*path: Any, value: Any) -> Callable[[Any], None]:
    """Set a place of the first cache tensor."""
    return at("kv", "groups", 0, "parts", 0, *path, value=value)


DECODE, PLAN, WEIGHTS = "programs/decode.json", "plan.json", "weights.json"


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (PLAN, at("kv", "page_size", value=16000), "have pages|has pages"),
        (PLAN, at("limits", "page_size", value=16000), "kv.page_size is 4, limits.page_size 16000|slot field pages"),
        (PLAN, cached("page_shape", value=lambda s: s[:-1]), "wants \\[P, S, kv_heads, head_dim"),
        (PLAN, cached("page_shape", 0, value=3), "holds 3 tokens, kv.page_size is 4"),
        (PLAN, cached("page_shape", 2, value=4), "axis head_dim of k_cache is 4"),
        (PLAN, cached("dtype", value="float16"), "v_cache is float32, the contract wants float16"),
        (PLAN, cached("name", value="tokens"), "tokens names two values"),
        (PLAN, at("limits", "max_rows", value=5), "slot field history is"),
        (PLAN, at("limits", "max_rows", value=0), "limits.max_rows is 0"),
        (PLAN, at("limits", "context_len", value=65), "slot field history is"),
        (PLAN, at("memory", "arena", value=256), "of 256"),
        (PLAN, at("memory", "slot", value=lambda n: n - 256), "memory.slot is"),
        (PLAN, at("memory", "weights", value=lambda n: n - 256), "takes bytes .* of"),
        (PLAN, at("buckets", value=lambda b: b * 6000), "there are"),
        (PLAN, at("files", value=3), "does not list the plan's files"),
        ("config.json", at("vocab_size", value=2**20), "its config has vocab_size=1048576"),
        ("config.json", at("vocab_size", value="61"), "vocab_size must be a positive integer"),
        ("config.json", at("eos_token_id", value={}), "eos_token_id must be"),
        (WEIGHTS, at(0, "offset", value=2**40), "takes bytes 1099511627776"),
        (WEIGHTS, at(0, "offset", value=-256), "takes bytes -256"),
        (DECODE, attribute("decode_attention", heads=-3, kv_heads=-1, head_dim=-8), "attribute heads is -3"),
        (DECODE, attribute("decode_attention", window="x"), "attribute window is 'x'|window"),
        (DECODE, attribute("decode_attention", heads=6, head_dim=4), "head_dim|kv_heads"),
        (DECODE, launch("locate", "operands", row_slot="query_start"), "reads 'query_start' as row_slot"),
        (DECODE, launch("embedding", "operands", ids="row_slot"), "reads 'row_slot' as ids"),
        (DECODE, launch("decode_attention", "operands", q="nowhere"), "reads 'nowhere', which is nothing"),
        (DECODE, launch("embedding", "results", x="temperature"), "gives 'temperature', which no launch may write"),
        (DECODE, at("launches", value=lambda all: all[1:]), "before any launch gives it"),
        (DECODE, at("launches", value=lambda all: all[:-1]), "no launch gives"),
        (DECODE, at("launches", 0, "op", value="system"), "locate|system: there is no such op"),
        (DECODE, at("phase", value="extend"), "program decode says that it is for 'extend'"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(name, edit, message, folder):
    change(folder, name, edit)
    refused(folder, message)


def test_rows_that_the_checkpoint_has_not_are_refused(folder, tmp_path):
    """By a plan that names the right checkpoint."""
    plan = artifact.load(folder)
    shapes = {source: need.shape for source, need in needs(w.param for w in plan.weights).items()}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
        tmp_path / "model" / "model.safetensors",
    )
    checkpoint = open_checkpoint(tmp_path / "model")
    change(folder, "plan.json", at("checkpoint", value=checkpoint.fingerprint()))
    CpuExecutable(artifact.load(folder), checkpoint, pages=4)

    def beyond(weights: Any) -> None:
        piece = next(w for w in weights if w["param"].get("pieces"))["param"]["pieces"][0]
        piece["box"][0] = [n + 10**6 for n in piece["box"][0]]

    change(folder, WEIGHTS, beyond)
    with pytest.raises(PlanError, match=r"needs tensor model\.embed_tokens\.weight"):
        CpuExecutable(artifact.load(folder), checkpoint, pages=4)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.json",
        "/etc/passwd",
        "programs/../../secret.json",
        "kernels/x.json",
        "limits.json",
        "plan.json",
    ],
)
def test_a_file_that_is_no_part_of_a_plan_is_not_read(name, folder, monkeypatch):
    (folder.parent / "secret.json").write_text("{}")
    manifest = json.loads((folder / "plan.json").read_text())
    manifest["files"][name], manifest["sizes"][name] = "0" * 64, 2
    manifest.pop("digest")
    manifest["digest"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / "plan.json").write_bytes(canonical(manifest))
    with pytest.raises(PlanError, match="which is no file of a plan"):
        artifact.load(folder)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", [pipe, device, directory])
@pytest.mark.parametrize("name", ["weights.json", "programs/decode.json", "tuned.json", "golden.json"])
def test_what_is_no_regular_file_is_neither_read_nor_waited_for(kind, name, folder):
    (folder / name).unlink(missing_ok=True)
    kind(folder / name)
    with pytest.raises(PlanError, match=r"is no file|holds no golden|cannot be read"):
        golden.load(folder) if name == "golden.json" else artifact.load(folder)


def test_a_file_of_another_size_is_not_read(folder):
    with (folder / "weights.json").open("ab") as file:
        file.truncate(2**41)  # a hole
    with pytest.raises(
        PlanError, match=r"weights.json: content does not match .*2199023255552 bytes, the plan states"
    ):
        artifact.load(folder)


def test_a_file_whose_size_nobody_stated_has_a_limit(folder):
    with (folder / "tuned.json").open("ab") as file:
        file.truncate(2**41)
    with pytest.raises(PlanError, match=r"tuned.json has 2199023255552 bytes, more than any plan's"):
        artifact.load(folder)


def test_hundreds_of_changes_crash_nothing(saved):
    """Each is signed, loaded and, where it is not refused, run, in a process that a crash would end."""
    command = [sys.executable, str(HERE / "hostile_plans.py"), str(saved), "7", "150"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    lines = made.stdout.splitlines()
    assert made.returncode == 0, (lines[-1:], made.stderr[-2000:])
    strange = [
        line
        for line in lines
        if not line.endswith(('"ran"', '"unsigned"', '"refused rows"')) and '"refused: ' not in line
    ]
    assert strange == []
    assert sum('"refused: ' in line for line in lines) > 30
    assert len(lines) == 150


def test_the_unchanged_plan_runs(folder):
    seal(folder)
    CpuExecutable(artifact.load(folder), dummy(LLAMA), pages=4)
    assert open_checkpoint("dummy", config=dict(LLAMA)).path == Path("dummy")
