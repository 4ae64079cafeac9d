"""What bench takes its floors from: measured on a GPU whose clock a test turns."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_driver import FakeBindings
from fake_objects import FakeNode, cubin
from plans import argument_sizes

pytest.importorskip("triton")
from benchmarks.gpu import products, rates

from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.plan.devices import DEVICES
from makeready.graphs.plan.targets import find_target

SMALL = 2**21


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "COPIED", SMALL)
    monkeypatch.setattr(rates, "SIDE", 256)
    monkeypatch.setattr(rates, "SECONDS", 0.0)
    monkeypatch.setattr(rates, "KEPT", 2)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's choices, compiled; what is loaded are kernels of the same parameters that the fake knows."""
    real = products.build

    def build(*args, **options) -> products.Built:
        built = real(*args, **options)
        cubins = {}
        for choice in built.choices:
            for node in choice.nodes:
                sizes = [size for argument in node.arguments for size in argument_sizes(argument)]
                made = built.binaries[node.binary]
                cubins[node.binary] = cubin(made.function, sizes + [8] * made.null_pointers)
        assert cubins.keys() == built.cubins.keys()
        return replace(built, cubins=cubins)

    monkeypatch.setattr(products, "build", build)


def test_rates_are_bytes_and_operations_over_the_time_of_the_fastest_way(made_up):
    kernels: list[str] = []

    def on_kernel(node: FakeNode) -> None:
        kernels.append(node.function.name)
        bindings.clock += 0.25 if "fp8" in node.function.name else 0.5  # milliseconds

    bindings = FakeBindings(name=b"NVIDIA H200", copy_ms=1e-9, on_kernel=on_kernel)
    found = rates.measure(Driver(bindings))
    bindings.check_released()
    assert found.copy == pytest.approx(2e12)  # a byte in 1e-12 s is read and written
    assert found.reads == pytest.approx(SMALL / 0.5e-3)
    assert found.bandwidth == found.copy
    assert found.flops["bfloat16"] == found.flops["float16"] == pytest.approx(2 * 256**3 / 0.5e-3)
    assert found.flops["float8_e4m3fn"] == pytest.approx(2 * 256**3 / 0.25e-3)
    assert found.source == "measured"
    assert any("fp8" in name for name in kernels)
    assert found.floor(4e12) == pytest.approx(2.0)
    assert found.floor(1.0, 2 * 256**3) == pytest.approx(0.5e-3)
    target = found.on(find_target("sm_90a", "h100"))
    assert (target.bandwidth, target.multiprocessors) == (found.bandwidth, 132)
    assert "NVIDIA H200" in found.line()
    assert found.record()["source"] == "measured"


@pytest.mark.parametrize(("gpu", "device"), [(b"NVIDIA H100 80GB HBM3", "h100"), (b"NVIDIA X9000", "h200")])
def test_without_triton_rates_come_from_the_table_and_say_so(gpu, device, monkeypatch):
    def build(*args, **options):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(products, "build", build)
    bindings = FakeBindings(name=gpu, copy_ms=1e-9)
    found = rates.measure(Driver(bindings))
    bindings.check_released()
    assert found.flops["bfloat16"] == DEVICES[device].flops["bfloat16"]
    assert (found.reads, found.bandwidth) == (None, found.copy)
    assert f"those of {device}" in found.source
    assert "triton" in found.source


def test_importing_it_takes_neither_torch_nor_triton():
    import subprocess

    code = "import sys, benchmarks.gpu.rates; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    scripts = Path(__file__).parents[2] / "scripts"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=scripts
    )
    assert done.stdout.strip() == "[]"
