"""Time stamps around graphs, on a driver whose clock graphs and copies turn."""

from __future__ import annotations

import pytest
from benchmarks.gpu.step_times import StepTimes, words
from fake_driver import FakeBindings
from plans import dummy, tiny

from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.example import typical_step


def test_graphs_and_what_is_between_them():
    bindings = FakeBindings()
    executable = CudaExecutable(tiny(), dummy(), driver=Driver(bindings))
    bucket = min(b for b in tiny().buckets if b.phase == "decode")
    step = typical_step(executable, bucket, 8)
    bindings.graph_ms = lambda nodes: 2.5
    with StepTimes(executable.driver) as stamps:
        assert stamps.take(5) is None
        for late in (9.0, 0.5, 0.75, 9.0):
            executable.launch(bucket, step).wait()
            bindings.clock += late  # until the host has its next step ready
        found = stamps.take(3)
        assert found is not None
        assert found["graph"] == pytest.approx(2.5)
        assert found["between"] == pytest.approx(0.625)  # of the last three
        assert stamps.take(3) is None  # those were taken
        executable.launch(bucket, step).wait()
        assert stamps.take(3) is None  # one graph has nothing between it and another
    assert words(found) == "; graphs 2.50 ms, 0.62 between them"
    executable.launch(bucket, step).wait()  # as before
    executable.close()
    bindings.check_released()
