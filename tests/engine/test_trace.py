"""The step trace: valid for its readers, whole or cut off, and true to the times."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from step_records import make_record, overlapped

from makeready.engine import trace as module
from makeready.engine.step_record import StepRecord
from makeready.engine.trace import DEVICE, HOST, StepTrace


def traced(path: Path, records: list[StepRecord]) -> list[dict[str, Any]]:
    with StepTrace(path) as trace:
        for record in records:
            trace.step(record)
    return json.loads(path.read_text())


def slices(events: list[dict[str, Any]], row: int) -> list[dict[str, Any]]:
    return sorted((e for e in events if e["ph"] == "X" and e["tid"] == row), key=lambda e: e["ts"])


def test_rows_hold_what_happened_when(tmp_path: Path) -> None:
    events = traced(tmp_path / "t.json", overlapped(5))
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {HOST: "host", DEVICE: "device"}
    for row in (HOST, DEVICE):
        for before, after in pairwise(slices(events, row)):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.01, "two slices of a row overlap"
    device = slices(events, DEVICE)
    assert [e["name"] for e in device] == ["decode-8"] * 5
    # From the first launch on the device never waits: each step begins where the one before it ended.
    assert [e["dur"] for e in device[1:]] == pytest.approx([10000] * 4, abs=0.01)
    assert device[0]["args"] == {
        "rows": 6,
        "tokens": 6,
        "padding": 2,
        "cached": 0,
        "new": 6,
        "retractions": 0,
    }
    counters = {e["name"]: e["args"] for e in events if e["ph"] == "C"}
    assert counters == {
        "requests": {"running": 6, "waiting": 2},
        "pages": {"held": 3, "cached": 4, "free": 5},
    }


def test_a_device_that_waits_for_the_host_shows_a_gap(tmp_path: Path) -> None:
    late = {"plan_start": 2.0, "launch_start": 2.001, "launch_end": 2.002, "wait_start": 2.002}
    records = [make_record(), make_record(**late, results_read=2.01, commit_end=2.011)]
    first, second = slices(traced(tmp_path / "t.json", records), DEVICE)
    assert first["ts"] + first["dur"] == pytest.approx(11_000)
    assert (second["ts"], second["dur"]) == (pytest.approx(1_002_000), pytest.approx(8000))


def test_what_a_killed_process_leaves_is_a_list_without_its_bracket(tmp_path: Path) -> None:
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from step_records import overlapped
from makeready.engine.trace import StepTrace
trace = StepTrace({str(tmp_path / "t.json")!r})
for record in overlapped(2000):
    trace.step(record)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 9
    text = (tmp_path / "t.json").read_text()
    events = json.loads(text + "]")
    steps = len(slices(events, DEVICE))
    assert 2000 - module.LINES <= steps < 2000


def test_slow_steps_are_not_kept_back(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path / "t.json")
    trace.step(make_record())
    trace.step(make_record(results_read=3.0, commit_end=3.1))
    assert len(slices(json.loads((tmp_path / "t.json").read_text() + "]"), DEVICE)) == 2
    trace.close()
    trace.close()
    json.loads((tmp_path / "t.json").read_text())
