"""What a batch job says of itself while it runs."""

from __future__ import annotations

import io

import pytest

from makeready.engine.entrypoints import status
from makeready.engine.entrypoints.status import RowProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(status.time, "perf_counter", lambda: now[0])
    return now


def test_figures_are_of_this_start_and_rows_of_the_whole_job(clock):
    stream = io.StringIO()
    with RowProgress(total=50, before=20, stream=stream) as progress:
        clock[0] += 5
        progress.update(25, 1, 100, 0.25)  # too early to say anything
        clock[0] += 15
        progress.update(30, 1, 400, 0.25)
        progress.update(31, 1, 410, 0.25)
        clock[0] += 20
        progress.update(50, 2, 1600, 0.0)
    assert stream.getvalue().splitlines() == [
        "30 of 50 rows (1 with errors), 20.0 tokens/s, 25% of prompt tokens cached, 40 s left",
        "50 of 50 rows (2 with errors), 40.0 tokens/s",
    ]


def test_nothing_is_promised_before_a_row_is_done(clock):
    stream = io.StringIO()
    with RowProgress(total=50, before=20, stream=stream) as progress:
        clock[0] += 11
        progress.update(20, 0, 33, 0.0)
    assert stream.getvalue() == "20 of 50 rows, 3.0 tokens/s\n"
