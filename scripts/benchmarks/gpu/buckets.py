"""Full steps of every bucket on the device, and what each kind of launch has of them.

Graphs are launched with nothing between them, so this is the device's time alone. What a kind of launch takes is
the time of the whole step less that of a step without it: kernels overlap and leave things in L2, so the parts
need not add up. The floor is every byte once at the target's bandwidth, or every operation at its rate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from makeready.graphs.executable.cuda import CudaExecutable
from makeready.graphs.executable.typical import typical_step
from makeready.graphs.inspect.analysis import work
from makeready.graphs.plan import Launch, Plan
from makeready.graphs.spec import DECODE, Bucket
from makeready.graphs.targets import find_target

_SECONDS = 20e-3  # of one measurement at least
_SHOWN = 0.02  # of a step, from which a part is worth a line


def buckets(executable: CudaExecutable, *, context: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a full step of every bucket, of its parts, and their floors.

    Args:
        context: tokens of context of a decoding row; an extend step is one prompt of all its tokens.
        repeats: measurements of each, which take turns; the median counts.
    """
    plan = executable.plan
    executable.fill_cache()
    bench, found = executable.workbench(), []
    for bucket in plan.buckets:
        executable.launch(bucket, typical_step(plan, bucket, executable.pages, context)).wait()
        classes = plan.programs[bucket.phase].classes
        # Left out, what makes token ids would leave others' bytes in their place, which are then looked up.
        spared = [i for i in range(len(classes)) if not _makes_ids(plan, bucket.phase, i)]
        graphs = [bench.graph(bucket), *(bench.graph(bucket, without={i}) for i in spared)]
        replays = [max(1, round(_SECONDS / bench.seconds(graph, 1) + 0.5)) for graph in graphs]
        rounds = [
            [bench.seconds(graph, count) for graph, count in zip(graphs, replays, strict=True)]
            for _ in range(repeats)
        ]
        whole, *rest = (statistics.median(column) for column in zip(*rounds, strict=True))
        bench.clear()
        costs = floors(plan, bucket, context)
        parts = [
            {"op": classes[i].op, "class": i, "seconds": whole - left, **costs[i]}
            for i, left in zip(spared, rest, strict=True)
        ]
        floor = math.fsum(cost["floor"] for cost in costs)
        found.append({"bucket": str(bucket), "seconds": whole, "floor": floor, "parts": parts})
    return found


def _makes_ids(plan: Plan, phase: str, op_class: int) -> bool:
    """Whether launches of a class write integers to the arena."""
    program = plan.programs[phase]
    made = {v for launch in program.launches if launch.op_class == op_class for v in launch.results.values()}
    return any(plan.spec(phase, name).dtype.startswith("int") for name in made & program.buffers.keys())


def floors(plan: Plan, bucket: Bucket, context: int) -> list[dict[str, Any]]:
    """Launches, floor in seconds, and shape of the weights of each op class in a step of :func:`buckets`."""
    target, real = find_target(plan.target), bucket
    if bucket.phase != DECODE:  # one prompt: on average a token sees half of it
        real, context = Bucket(bucket.phase, 1, bucket.tokens), bucket.tokens // 2
    program = plan.programs[bucket.phase]
    of_class: list[list[Launch]] = [[] for _ in program.classes]
    for launch in program.launches:
        of_class[launch.op_class].append(launch)
    found = []
    for launches in of_class:
        nbytes, _, compute = work(plan, launches[0], real, context, target)
        weight = launches[0].operands.get("weight")
        found.append(
            {
                "launches": len(launches),
                "floor": len(launches) * max(nbytes / target.bandwidth, compute),
                "weight": None if weight is None else list(plan.spec(bucket.phase, weight).shape),
            }
        )
    return found


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line a bucket, and one for each of its parts that is worth it."""
    lines = []
    for step in found:
        whole, floor = step["seconds"], step["floor"]
        lines.append(
            f"{step['bucket']:<20} {1e3 * whole:9.3f} ms  floor {1e3 * floor:8.3f}  {floor / whole:.2f}"
        )
        for part in sorted(step["parts"], key=lambda part: -part["seconds"]):
            if part["seconds"] > _SHOWN * whole:
                width = "x".join(map(str, part["weight"])) if part["weight"] else ""
                share = part["floor"] / part["seconds"]
                lines.append(
                    f"  {part['op']:<20} {width:<14} {part['launches']:4d} launches "
                    f"{1e6 * part['seconds'] / part['launches']:9.2f} µs each  floor {share:.2f}"
                )
    return lines
