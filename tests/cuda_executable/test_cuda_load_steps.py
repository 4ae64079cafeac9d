"""The bench's suite of loading steps on the fake driver: what it writes is loaded, and every line is there."""

from __future__ import annotations

import numpy as np
from benchmarks.gpu import load_steps
from fake_driver import FakeBindings
from plans import tiny

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.executable.cuda import driver as cuda_driver
from makeready.graphs.plan import artifact


def test_written_weights_are_those_that_the_plan_reads(tmp_path):
    plan = tiny()
    nbytes = load_steps.write_weights(plan, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    sources = {p.source for w in plan.weights for o in w.param.operands for p in o.pieces}
    assert sources == checkpoint.tensors.keys()
    read = {name: checkpoint.read(name).view(np.uint8) for name in sources}
    assert sum(tensor.size for tensor in read.values()) == nbytes
    assert all(len(np.unique(tensor)) > 100 for tensor in read.values() if tensor.size > 2000)


class Bindings(FakeBindings):
    def cuCtxSynchronize(self) -> tuple[int]:  # noqa: N802
        return (0,)


def test_all_is_measured_and_told(tmp_path, monkeypatch):
    artifact.save(tiny(), tmp_path / "plan")
    monkeypatch.setattr(cuda_driver, "load_bindings", Bindings)
    monkeypatch.setattr(load_steps, "first_token", lambda plan, weights: 1.0)
    some = ("as they are", "windows of 64 MiB", "never mapped ahead of pinning", "through pinned buffers")
    monkeypatch.setattr(load_steps, "SETTINGS", {name: load_steps.SETTINGS[name] for name in some})
    found = load_steps.measure(tmp_path / "plan", tmp_path / "weights", lambda detail: None)
    assert found["checked"] > 10
    assert set(found["loads"]) == set(load_steps.SETTINGS)
    lines = load_steps.table(found)
    for name in (*found["steps"], *load_steps.SETTINGS):
        assert sum(line.strip().startswith(name) for line in lines) >= 1
    assert lines[-1].endswith("1.00 1.00 1.00 1.00 s")
