"""Clocks and power as the driver's own tool tells them; a script stands in for it."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
from benchmarks.gpu import clocks

TOOL = """#!{python}
import sys, time
assert "--query-gpu=clocks.sm,clocks.mem,power.draw.instant,clocks_event_reasons.active" in sys.argv
assert "--loop-ms=20" in sys.argv
for line in {lines}:
    print(line, flush=True)
time.sleep(600)
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nvidia-smi"


def says(tool: Path, *lines: str) -> None:
    tool.write_text(TOOL.format(python=sys.executable, lines=lines))
    tool.chmod(0o755)


def seen(watch: clocks.Clocks, begin: float, samples: int) -> dict | None:
    """What the span from ``begin`` to now holds, once it has so many samples."""
    end = time.monotonic() + 60
    while ((found := watch.between(begin, time.perf_counter())) or {}).get("samples", 0) < samples:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_means_of_a_span_and_what_held_clocks_back(tool):
    says(
        tool,
        "1980, 3201, 600.5, 0x0000000000000000",
        "[N/A], 3201, 1, 0x0",
        "1500, 3201, 699.5, 0x0000000000000024",
    )
    before = time.perf_counter()
    with clocks.Clocks() as watch:
        found = seen(watch, before, 2)
        after = time.perf_counter()
        assert watch.between(after, after + 60) is None
    assert found == {
        "samples": 2,
        "sm_mhz": 1740.0,
        "sm_mhz_least": 1500.0,
        "memory_mhz": 3201.0,
        "watts": 650.0,
        "held_back_by": ["power", "temperature"],
    }
    assert clocks.words(found) == "; 1740 MHz, 650 W, held back by power and temperature"
    assert not any(thread.name == watch._reader.name for thread in threading.enumerate())


def test_without_the_tool_nothing_is_told(tool):
    with clocks.Clocks() as watch:
        assert watch.between(0.0, time.perf_counter()) is None
    assert clocks.words(None) == ""
