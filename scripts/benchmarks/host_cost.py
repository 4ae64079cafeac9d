"""What a step costs the engine itself: plan, stage, launch and commit, on an executable that takes no time.

Two loads. ``decode``: every row generates, nothing comes or goes. ``turnover``: requests of few tokens, so
that at every step some end and, where any wait, as many are admitted. Times are of the process on the CPU,
so other processes of a shared machine count only as far as they take its caches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.record import summary
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.virtual import InstantExecutable
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket, CacheGroup, CacheSpec, Limits
from makeready.graphs.planner.request import Request as PlanRequest

MAX_TOKENS, PAGE_SIZE, TURNOVER_TOKENS = 8192, 64, 16


def _plan(limits: Limits) -> Any:
    """As much of a plan as the engine sees: a bucket for each of two kinds of step, and one cache group."""
    from makeready.graphs.steps.base import (
        declare,
    )  # imports torch, which others of the suites do without

    rows = limits.max_rows
    buckets = (Bucket(DECODE, rows, rows), Bucket(EXTEND, rows, limits.max_tokens))
    kv = CacheSpec(PAGE_SIZE, (CacheGroup("kv", (), PAGE_SIZE),))
    steps, slots = declare(limits, PlanRequest(), kv)
    return SimpleNamespace(limits=limits, buckets=buckets, steps=steps, slots=slots, kv=kv)


def host_cost(
    options: SchedulerOptions,
    *,
    rows: Sequence[int],
    waiting: Sequence[int],
    context: int,
    steps: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """CPU microseconds a step for every number of running rows and waiting requests.

    Args:
        options: of the scheduler.
        rows: requests that run at once.
        waiting: requests that wait beside them.
        context: prompt tokens of each.
        steps: steps of a measurement.
        repeats: measurements of each.
    """
    found = []
    for running in rows:
        for queue in waiting:
            decode = _measured(options, running, queue, context, steps, repeats, steps * repeats + 2)
            row = {"rows": running, "waiting": queue, "decode_us": summary(decode)}
            if queue >= running * steps * repeats // TURNOVER_TOKENS:
                turnover = _measured(options, running, queue, context, steps, repeats, TURNOVER_TOKENS)
                row["turnover_us"] = summary(turnover)
            found.append(row)
    return found


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The figures as lines of text."""
    lines = []
    for row in found:
        kinds = [
            f"{name[:-3]} {row[name]['min']:.0f} us" for name in ("decode_us", "turnover_us") if name in row
        ]
        lines.append(f"{row['rows']:4d} rows, {row['waiting']:6d} waiting: {', '.join(kinds)} a step")
    return lines


def _measured(
    options: SchedulerOptions, rows: int, waiting: int, context: int, steps: int, repeats: int, output: int
) -> list[float]:
    """CPU microseconds a step of each measurement, once all rows run."""
    limits = Limits(rows, max(MAX_TOKENS, rows), context + output + PAGE_SIZE, PAGE_SIZE)
    engine = Engine(InstantExecutable(_plan(limits), pages=rows * limits.pages_per_row + 1), options)
    params = SamplingParams(temperature=0, max_new_tokens=output, ignore_eos=True)
    prompts = np.random.default_rng(0).integers(0, 1000, (rows, context)).tolist()
    for i in range(rows + waiting):
        sequence = TokenSequence(prompts[i % rows], params, seed=0, end_ids=frozenset())
        engine.submit(sequence, Reply(sequence))
    for _ in range(-(-rows * context // limits.max_tokens) + 1):
        engine.step()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        for _ in range(steps):
            engine.step()
        found.append(1e6 * (time.process_time() - began) / steps)
    return found
