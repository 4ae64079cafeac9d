"""Records of an overlapped engine: the next step is launched before a step's results are read."""

from __future__ import annotations

from typing import Any

from makeready.engine.step_record import StepRecord
from makeready.graphs.plan.spec import DECODE, Bucket

BUCKET = Bucket(DECODE, 8, 8)


def make_record(**changes: Any) -> StepRecord:
    """A decode step of 6 rows that took 10 ms from its launch at 1.001 s; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "bucket": BUCKET,
        "rows": 6,
        "tokens": 6,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "new_tokens": 6,
        "drafts": 0,
        "drafted": 0,
        "accepted": 0,
        "retractions": 0,
        "waiting": 2,
        "running": 6,
        "free": 5,
        "cached": 4,
        "held": 3,
        "plan_start": 1.0,
        "launch_start": 1.0005,
        "launch_end": 1.001,
        "wait_start": 1.002,
        "results_read": 1.011,
        "commit_end": 1.0115,
    }
    return StepRecord(**{**fields, **changes})


def overlapped(count: int) -> list[StepRecord]:
    """Steps of 10 ms each, every one launched 1 ms after the one before it."""
    records, times = [], ("wait_start", "results_read", "commit_end")
    for k in range(count):
        # Step k is planned right after step k - 2 was committed, and read 10 ms after step k - 1.
        planned = 1.0 + (0.0 if k == 0 else 0.001 if k == 1 else 0.0115 + 0.01 * (k - 2))
        late = {"plan_start": planned, "launch_start": planned + 0.0002, "launch_end": planned + 0.0004}
        shift = 0.01 * k
        records.append(make_record(**late, **{n: getattr(make_record(), n) + shift for n in times}))
    return records
