"""The step trace: valid for its readers, whole or cut off, and true to the times."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from step_records import make_record, overlapped

from makeready.engine import trace as module
from makeready.engine.output import Output
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
        "waited_us": 9000.0,
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


def check_format(events: list[dict[str, Any]]) -> None:
    """Hold a trace to Chrome's Trace Event Format, as Perfetto reads it.

    Perfetto cuts times off to whole nanoseconds, drops slices that partly overlap others of their row, and
    shows counters that are numbers.
    """
    rows: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    spans: dict[Any, list[tuple[float, str, str]]] = defaultdict(list)
    for event in events:
        assert isinstance(event["name"], str)
        assert all(type(event[name]) is int for name in ("pid", "tid"))
        if event["ph"] == "M":
            (value,) = event["args"].values()
            assert type(value) is (int if event["name"].endswith("sort_index") else str)
            continue
        assert math.isfinite(event["ts"])
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            begin = int(event["ts"] * 1000.0)
            rows[event["pid"], event["tid"]].append((begin, begin + int(event["dur"] * 1000.0)))
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) for value in event["args"].values())
        else:
            assert event["ph"] in "be"
            spans[event["cat"], event["id"]].append((event["ts"], event["ph"], event["name"]))
    for slices in rows.values():
        for before, after in pairwise(sorted(slices)):
            assert before[1] <= after[0], "two slices of a row overlap"
    for nested in spans.values():
        open_: list[str] = []
        for _, kind, name in sorted(nested, key=lambda event: event[0]):
            if kind == "b":
                open_.append(name)
            else:
                assert open_.pop() == name
        assert not open_


def test_what_is_written_is_of_the_format_at_any_times(tmp_path: Path) -> None:
    pick = random.Random(3)
    with StepTrace(tmp_path / "t.json") as trace:
        at = time.perf_counter() + pick.random()
        for step in range(3000):
            names = ("plan_start", "launch_start", "launch_end", "wait_start", "results_read", "commit_end")
            gaps = [pick.choice((0, pick.random() * 1e-5, pick.random() * 1e-2)) for _ in names]
            *times, at = accumulate(gaps, initial=at)
            trace.step(make_record(**dict(zip(names, [*times, at][1:], strict=True))))
            if step % 7 == 0:
                whole = pick.random() * 3
                queue = pick.choice((0, whole * pick.random(), whole))
                meta = {"id": f"{step:032x}", "e2e_latency": whole, "queue_time": queue}
                meta |= {"time_to_first_token": pick.choice((None, whole)), "cached_tokens": 0}
                trace.finish(Output("", (), "abort", 4, meta_info=meta | {"num_retractions": 0}))
    events = json.loads((tmp_path / "t.json").read_text())
    check_format(events)
    assert len(slices(events, DEVICE)) == 3000
    assert sum(event["ph"] == "b" for event in events) == 2 * 429


def test_the_share_of_idle_time_can_be_read_off(tmp_path: Path) -> None:
    """Ten steps of 8 ms, each launched 2 ms after the one before it ended."""
    records = [
        make_record(
            plan_start=at - 0.001,
            launch_start=at - 0.0005,
            launch_end=at,
            wait_start=at + 0.0001,
            results_read=at + 0.008,
            commit_end=at + 0.0081,
        )
        for at in (5 + 0.01 * k for k in range(10))
    ]
    device = slices(traced(tmp_path / "t.json", records), DEVICE)
    length = device[-1]["ts"] + device[-1]["dur"] - device[0]["ts"]
    assert 1 - sum(event["dur"] for event in device) / length == pytest.approx(18 / 98, abs=1e-5)


def test_a_request_is_a_line_from_its_arrival_to_its_end(tmp_path: Path) -> None:
    start = time.perf_counter()
    meta = {
        "id": "a",
        "e2e_latency": 2.0,
        "queue_time": 0.5,
        "time_to_first_token": 0.75,
        "cached_tokens": 3,
        "num_retractions": 1,
    }
    with StepTrace(tmp_path / "t.json") as trace:
        trace.step(make_record(plan_start=start - 5))
        trace.finish(Output("", (1, 2), "stop", 4, meta_info=meta))
        trace.finish(Output.refused("too long"))
        late = time.perf_counter() - start
    events = json.loads((tmp_path / "t.json").read_text())
    times = {(event["name"], event["ph"]): event["ts"] for event in events if event["ph"] in "be"}
    assert set(times) == {(name, kind) for name in ("request", "queue") for kind in "be"}
    assert times["request", "e"] == pytest.approx(5e6, abs=1e6 * late)
    assert times["request", "e"] - times["request", "b"] == pytest.approx(2e6)
    assert times["queue", "e"] - times["request", "b"] == pytest.approx(0.5e6)
    (facts,) = (event["args"] for event in events if event["name"] == "request" and event["ph"] == "b")
    assert facts == {
        "reason": "stop",
        "prompt_tokens": 4,
        "cached_tokens": 3,
        "completion_tokens": 2,
        "retractions": 1,
        "first_token_us": 750_000,
    }


def test_a_full_disk_leaves_whole_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, write = 20_001, os.write

    def full(file: int, data: Any) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(file, bytes(data)[:room])
        room -= taken
        return taken

    trace = StepTrace(tmp_path / "t.json")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):  # noqa: PT012 - which of them is the one too many is not its business
        for record in overlapped(2000):
            trace.step(record)
    trace.close()
    events = json.loads((tmp_path / "t.json").read_text() + "]")
    check_format(events)


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
