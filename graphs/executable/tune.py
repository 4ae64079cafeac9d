"""Which of the ways that a plan carries is fastest on this GPU, measured in their place.

For every bucket there is a graph with the planner's first choices, one for each other choice of each op class that
differs in nothing else, and one in a single lane where the plan has two; they take turns. A choice that makes the
whole step faster is taken, and all that were taken are tried together before they count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.cuda.workbench import Workbench
from makeready.graphs.executable.example import typical_step
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import ONE_LANE, lanes_key, tuned_key
from makeready.graphs.plan.spec import Bucket

_ROUNDS = 5
_SECONDS = 12e-3  # of one measurement at least, so that starting and stopping the clock is lost in it
_WORTH = 1e-3  # of a step: what a choice must gain; repeated measurements differ by half as much


@dataclass(frozen=True)
class Gain:
    """What measuring a bucket changed.

    Attributes:
        before, after: seconds of a step with the planner's choices, and with those that are faster.
        choices: by ``tuned_key``, those that are faster.
        tried: how many other choices there were.
    """

    bucket: Bucket
    before: float
    after: float
    choices: dict[str, str]
    tried: int


def tune(
    executable: CudaExecutable,
    *,
    context: int = 1024,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[Plan, list[Gain]]:
    """Measure all choices of a loaded plan; the plan with this device's table, and what it gains by bucket.

    Args:
        context: tokens of context of a decoding row.
        progress: told how many of how many choices are measured, and in which bucket.

    Raises:
        PlanError: the plan carries one way to run each call.
    """
    plan = executable.plan
    alternatives = {bucket: _alternatives(plan, bucket) for bucket in plan.buckets}
    total = sum(len(tried) for tried in alternatives.values())
    if total == 0:
        raise PlanError(
            "the plan carries one way to run each call; compile it with plan.candidates=4 to tune it"
        )
    executable.fill_cache()
    bench, gains, done = executable.workbench(), [], 0
    for bucket in plan.buckets:
        progress(done, total, str(bucket))
        executable.launch(bucket, typical_step(executable, bucket, context)).wait()
        gains.append(_tune_bucket(bench, bucket, alternatives[bucket]))
        done += len(alternatives[bucket])
    progress(done, total, "")
    table = {key: name for gain in gains for key, name in gain.choices.items()}
    return replace(plan, tuned={**plan.tuned, bench.device.name: table}), gains


def _alternatives(plan: Plan, bucket: Bucket) -> list[tuple[str, str]]:
    """Key and name of every choice but the first of each op class, and of one lane instead of two."""
    program = plan.programs[bucket.phase]
    choices = [
        (tuned_key(bucket.phase, index, bucket), choice.name)
        for index, one in enumerate(program.classes)
        for choice in one.candidates[str(bucket)][1:]
    ]
    return [*choices, (lanes_key(bucket), ONE_LANE)] if program.lanes else choices


def _tune_bucket(bench: Workbench, bucket: Bucket, alternatives: list[tuple[str, str]]) -> Gain:
    first = bench.graph(bucket, {})
    others = [bench.graph(bucket, {key: name}) for key, name in alternatives]
    before, *seconds = _compare(bench, [first, *others])
    best: dict[str, tuple[float, str]] = {}
    for (key, name), took in zip(alternatives, seconds, strict=True):
        if took < (1 - _WORTH) * before:
            best[key] = min(best.get(key, (took, name)), (took, name))
    choices, after = {key: name for key, (_, name) in best.items()}, before
    if choices:
        before, after = _compare(bench, [first, bench.graph(bucket, choices)])
    bench.clear()
    if after >= (1 - _WORTH) * before:
        choices, after = {}, before
    return Gain(bucket, before, after, choices, len(alternatives))


def _compare(bench: Workbench, graphs: list[Any]) -> list[float]:
    """Median seconds of each graph; they take turns, as clocks and temperature drift."""
    replays = [max(1, round(_SECONDS / bench.seconds(graph, 1) + 0.5)) for graph in graphs]
    rounds = [[bench.seconds(g, n) for g, n in zip(graphs, replays, strict=True)] for _ in range(_ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]
