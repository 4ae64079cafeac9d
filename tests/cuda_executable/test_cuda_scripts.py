"""scripts/tune.py and the bench's suite of buckets on the fake driver."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks.gpu import buckets, steps_svg
from fake_driver import FakeBindings
from fake_objects import FakeNode
from plans import dummy, tiny

from makeready.engine.entrypoints.tune_options import TuneJob
from makeready.graphs.executable.cuda import driver as cuda_driver
from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.plan import artifact
from makeready.graphs.plan.program import PlanCandidate
from makeready.graphs.plan.spec import DECODE
from makeready.graphs.plan.targets import find_target

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def milliseconds(nodes: list[FakeNode]) -> float:
    """Second choices are faster by a half."""
    return sum(0.5 if node.function.name.endswith("_other") else 1.0 for node in nodes)


def test_tune_writes_the_table_and_says_what_it_gains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cuda_driver, "load_bindings", lambda: FakeBindings(graph_ms=milliseconds))
    folder = artifact.save(tiny(), tmp_path / "plan")
    monkeypatch.setattr(TuneJob, "open", lambda job: dummy())
    arguments = [f"plan={folder}", "checkpoint=dummy", "model=smollm2_135m"]
    assert script("tune").main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "bucket"
    assert [line.split()[0] for line in lines[1:]] == [str(bucket) for bucket in tiny().buckets]
    read = artifact.load(folder)
    assert read.digest == tiny().digest
    assert set(read.tuned) == {"Fake GPU"}
    assert set(read.tuned["Fake GPU"].values()) == {"second"}


def test_tune_refuses_what_it_cannot_tune(tmp_path, capsys):
    assert script("tune").main([f"plan={tmp_path}", "checkpoint=dummy"]) == 2
    assert "add model=qwen3_8b" in capsys.readouterr().err
    assert script("tune").main([f"plan={tmp_path}", "checkpoint=dummy", "model=smollm2_135m"]) == 1
    assert "holds no plan" in capsys.readouterr().err


def test_parts_of_a_step_end_where_the_next_begin():
    plan, bindings = tiny(), FakeBindings(graph_ms=lambda nodes: float(len(nodes)))
    executable = CudaExecutable(plan, dummy(), driver=Driver(bindings), kv_bytes=20 * plan.kv.page_bytes)
    recorded: list[int] = []

    def record(run: Callable[[], object]) -> list[tuple[float, float]]:
        """Kernel i ends at i + 1 milliseconds, and starts while the one before it runs."""
        before = len(bindings.launched)
        run()
        (graph,) = bindings.launched[before:]
        recorded.append(len(bindings.graphs[graph]))
        return [(max(0.0, i - 0.5) * 1e-3, (i + 1) * 1e-3) for i in range(recorded[-1])]

    names = [str(bucket) for bucket in plan.buckets]
    found = buckets.buckets(executable, names, context=40, repeats=2, seconds=0.02, record=record)
    executable.close()
    bindings.check_released()
    target = find_target(plan.target)
    assert len(recorded) == len(plan.buckets)
    for step, bucket in zip(found, plan.buckets, strict=True):
        program = plan.programs[bucket.phase]
        firsts: list[PlanCandidate] = [one.candidates[str(bucket)][0] for one in program.classes]
        nodes = sum(len(firsts[launch.op_class].nodes) for launch in program.launches)
        assert step["seconds"] == pytest.approx(nodes / 1e3)
        assert sum(part["seconds"] for part in step["parts"]) == pytest.approx(nodes / 1e3)
        assert [part["op"] for part in step["parts"]] == [one.op for one in program.classes]
        for part, first in zip(step["parts"], firsts, strict=True):
            assert part["seconds"] == pytest.approx(part["launches"] * len(first.nodes) / 1e3)
        if bucket.phase == DECODE:
            head = next(
                part for part in step["parts"] if part["weight"] == [96, 64] and part["op"] == "linear"
            )
            nbytes = 2 * 64 * 96 + 2 * 64 * bucket.rows + 4 * 96 * bucket.rows
            assert head["floor"] == pytest.approx(nbytes / target.bandwidth)
    picture = ElementTree.fromstring(steps_svg.picture(found[:1]))
    bars = [rect for rect in picture.iter(f"{SVG}rect") if rect.get("class") == "g"]
    bars, floors = bars[: len(bars) // 2], bars[len(bars) // 2 :]
    width = sum(float(bar.get("width", "")) for bar in bars)
    for bar in bars:
        kind, _, took = (bar.findtext(f"{SVG}title") or "").partition(": ")
        parts = [p for p in found[0]["parts"] if kind.split(" ")[0] in p["op"]]
        assert parts or kind == "others", kind
        assert took.endswith("ms")
    assert width == pytest.approx(640, abs=1)  # the whole step
    assert sum(float(bar.get("width", "")) for bar in floors) < 64
    text = buckets.table(found)
    assert sum(line.startswith(str(plan.buckets[0])) for line in text) == 1
