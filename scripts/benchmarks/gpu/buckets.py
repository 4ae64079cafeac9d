"""Full steps of buckets on the device, and what each kind of launch has of them.

A whole step is timed as graphs with nothing between them. Its parts come from one more step under the profiler: a
launch's time is from the end of the one before it to its own, since kernels start early and wait. Leaving a kind of
launch out of the graph instead says little of long steps: other numbers flow, and the GPU, which runs at the limit
of its power, clocks higher. For the same reason steps that are replayed for a moment may be faster than many in a
row, so how long is an option, and clocks and power are told beside it. The floor is every byte once at the GPU's
bandwidth, or every operation at its rate.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.gpu import timeline
from benchmarks.gpu.clocks import Clocks, words
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.example import typical_step
from makeready.graphs.inspect.analysis import work
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Launch
from makeready.graphs.plan.spec import DECODE, Bucket
from makeready.graphs.plan.targets import Target, target_of

_SHOWN = 0.01  # of a step, from which a part is worth a line

Record = Callable[[Callable[[], object]], list[tuple[float, float]]]


def buckets(
    executable: CudaExecutable,
    only: Collection[str],
    *,
    context: int,
    repeats: int,
    seconds: float,
    target: Target | None = None,
    record: Record = timeline.kernels,
) -> list[dict[str, Any]]:
    """Seconds of a full step of some buckets, of its parts, and their floors.

    Args:
        only: names of buckets.
        context: tokens of context of a decoding row; an extend step is one prompt of all its tokens.
        repeats: measurements of each whole step; the median counts.
        seconds: that each of them goes on for, at least.
        target: whose figures floors are computed from; None takes those that the plan was chosen by.
        record: gives start and end of every kernel of what it is given to run.
    """
    plan = executable.plan
    executable.fill_cache()
    bench, found = executable.workbench(), []
    for bucket in (b for b in plan.buckets if str(b) in only):
        step = typical_step(executable, bucket, context)
        executable.launch(bucket, step).wait()
        graph = bench.graph(bucket)
        replays = max(1, round(seconds / bench.seconds(graph, 1) + 0.5))
        with Clocks() as clocks:
            begin = time.perf_counter()
            whole = statistics.median(bench.seconds(graph, replays) for _ in range(repeats))
            seen = clocks.between(begin, time.perf_counter())
        bench.clear()
        classes = _classes_of_nodes(plan, bucket, bench.device.name)
        parts = _parts(record(lambda b=bucket, s=step: executable.launch(b, s).wait()), classes)
        costs, names = (
            floors(plan, bucket, context, bench.device.name, target),
            plan.programs[bucket.phase].classes,
        )
        found.append(
            {
                "bucket": str(bucket),
                "seconds": whole,
                "floor": math.fsum(cost["floor"] for cost in costs.values()),
                **({} if seen is None else {"clocks": seen}),
                "parts": [
                    {"op": names[i].op, "class": i, "seconds": s, **costs[i]} for i, s in parts.items()
                ],
            }
        )
    return found


def _classes_of_nodes(plan: Plan, bucket: Bucket, device: str) -> list[int]:
    """The op class of every kernel node of a bucket's graph, in order."""
    program, tuned = plan.programs[bucket.phase], plan.tuned.get(device, {})
    found = []
    for launch in _launches(plan, bucket, device):
        choice = program.candidate(launch.op_class, bucket, tuned)
        assert choice is not None
        found += [launch.op_class] * len(choice.nodes)
    return found


def _launches(plan: Plan, bucket: Bucket, device: str) -> list[Launch]:
    """What a bucket runs, chains in place of their launches."""
    return [call.launch for call in plan.programs[bucket.phase].calls(bucket, plan.tuned.get(device, {}))]


def _parts(kernels: Sequence[tuple[float, float]], classes: Sequence[int]) -> dict[int, float]:
    """Seconds of each op class in a recorded step."""
    assert len(kernels) == len(classes), f"{len(kernels)} kernels were recorded of a graph of {len(classes)}"
    ends = [kernels[0][0]]
    for _, end in kernels:
        ends.append(max(end, ends[-1]))
    seconds = dict.fromkeys(sorted(set(classes)), 0.0)
    for (before, end), index in zip(pairwise(ends), classes, strict=True):
        seconds[index] += end - before
    return seconds


def floors(
    plan: Plan, bucket: Bucket, context: int, device: str, target: Target | None = None
) -> dict[int, dict[str, Any]]:
    """By op class what a step of :func:`buckets` has of it on ``device``: launches, floor in seconds, weights."""
    target, real = target or target_of(plan), bucket
    if bucket.phase != DECODE:  # one prompt: on average a token sees half of it
        real, context = Bucket(bucket.phase, 1, bucket.tokens), bucket.tokens // 2
    of_class: dict[int, list[Launch]] = {}
    for launch in _launches(plan, bucket, device):
        of_class.setdefault(launch.op_class, []).append(launch)
    found = {}
    for index, launches in of_class.items():
        nbytes, flops, rate = work(plan, bucket.phase, launches[0], real.sizes, context, target)
        weight = launches[0].operands.get("weight")
        found[index] = {
            "launches": len(launches),
            "floor": len(launches) * max(nbytes / target.bandwidth, flops / rate),
            "weight": None if weight is None else list(plan.spec(bucket.phase, weight).shape),
        }
    return found


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line a bucket, and one for each of its parts that is worth it."""
    lines = []
    for step in found:
        whole, floor = step["seconds"], step["floor"]
        lines.append(
            f"{step['bucket']:<20} {1e3 * whole:9.3f} ms  floor {1e3 * floor:8.3f}  {floor / whole:.2f}"
            f"{words(step.get('clocks'))}"
        )
        for part in sorted(step["parts"], key=lambda part: -part["seconds"]):
            if part["seconds"] > _SHOWN * whole:
                width = "x".join(map(str, part["weight"])) if part["weight"] else ""
                share = part["floor"] / part["seconds"]
                lines.append(
                    f"  {part['op']:<26} {width:<14} {part['launches']:4d} launches "
                    f"{1e6 * part['seconds'] / part['launches']:9.2f} µs each  floor {share:.2f}"
                )
    return lines
