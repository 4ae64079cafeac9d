"""What the steps of a run say: the host's part, padding, and whether the device waited for the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from makeready.engine.step_record import StepRecord
from makeready.graphs.plan.spec import DECODE, VERIFY

BLOCKED = 20e-6  # seconds; a wait shorter than this found the results there
LAST = 40  # steps that only generate, whose throughput is the last one reported; SGLang logs as often


def step_figures(records: Sequence[StepRecord]) -> dict[str, Any]:
    """Figures of a run by phase: steps, milliseconds of the host, padding, and idle time of the device.

    ``idle_share`` is between a steady run of steps of one phase, and an upper bound: where the host found
    results there, the device may have waited since any moment after the launch, and counts as idle from it.
    """
    phases = sorted({record.bucket.phase for record in records})
    return {phase: _of_phase([r for r in records if r.bucket.phase == phase], records) for phase in phases}


def last_throughput(records: Sequence[StepRecord]) -> float:
    """Generated tokens a second over the last steps that only generate; 0 if there were fewer than two."""
    last = [record for record in records if record.bucket.phase in (DECODE, VERIFY)][-LAST - 1 :]
    if len(last) < 2:
        return 0.0
    return sum(record.new_tokens for record in last[1:]) / (last[-1].results_read - last[0].results_read)


def step_lines(figures: dict[str, Any]) -> list[str]:
    """The figures as lines of text."""
    lines = []
    for phase, row in figures.items():
        host = row["host_milliseconds"]
        lines.append(
            f"  {phase}: {row['steps']} steps of {row['milliseconds']['p50']:.2f} ms, host {host['p50']:.3f} ms "
            f"(p99 {host['p99']:.3f}), {row['padding_share']:.1%} padding, device idle at most "
            f"{row['idle_share']:.1%}"
        )
    return lines


def _of_phase(mine: Sequence[StepRecord], records: Sequence[StepRecord]) -> dict[str, Any]:
    phase = mine[0].bucket.phase
    pairs = [(a, b) for a, b in pairwise(records) if a.bucket.phase == b.bucket.phase == phase]
    spans = [after.results_read - before.results_read for before, after in pairs]
    tokens = sum(record.bucket.tokens for record in mine)
    host = [r.launch_end - r.plan_start + r.commit_end - r.results_read for r in mine]
    return {
        "steps": len(mine),
        "milliseconds": percentiles(spans),
        "host_milliseconds": percentiles(host),
        "padding_share": 1 - sum(record.tokens for record in mine) / tokens,
        "idle_share": sum(_idle(before, after) for before, after in pairs) / max(sum(spans), 1e-9),
    }


def _idle(before: StepRecord, after: StepRecord) -> float:
    """Most seconds that the device had nothing to do between two steps."""
    blocked = before.results_read - before.wait_start > BLOCKED
    free = before.results_read if blocked else before.launch_end
    return max(0.0, after.launch_end - free)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, 90th and 99th percentile and most, in milliseconds; zeros of nothing."""
    values = 1e3 * np.asarray(seconds if len(seconds) else [0.0])
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}
