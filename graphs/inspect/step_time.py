"""What a step of a plan should take: its launches by their kernels' own models, one after the other.

Floors (analysis.py) say what no kernel can be faster than; this says what to expect. A launch whose kernel has a
model takes what that says, which the plan keeps. One without takes its floor and what a launch costs. Launches that
read cached tokens are asked for what the step's rows really have; all others run the whole bucket, padding included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from makeready.graphs.inspect.analysis import contracts, launch_key, work
from makeready.graphs.plan.devices import device_named
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Launch
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import Target, target_of


@dataclass(frozen=True)
class Calibration:
    """What a plan's arithmetic does not know, the same for every model.

    Attributes:
        cache_seconds: to start and end a kernel without a model that reads cached tokens: it finds pages, and adds
            up what parts of a row came to.
        cache_share: of the bandwidth, or of the rate of operations, that such a kernel reaches.
        sustained: by how much longer kernels take in the engine than alone, where they were timed.
        step_seconds: between two steps, the host's part that is not hidden.
    """

    cache_seconds: float = 0.0
    cache_share: float = 1.0
    sustained: float = 1.0
    step_seconds: float = 0.0


# cache_seconds and cache_share: decode attention in bench/results/h200_steps.json and
# h200_steps_qwen3_30b_a3b_fp8.json: 7.0 us of a floor of 0.5, 10.8 of 3.7, 68 of 60, 140 of 119. The other two were
# fitted to the latencies of four models (docs/predict.md has the table); why steps take longer in the engine
# than alone is not known (docs/NOTES.md).
GPU = Calibration(cache_seconds=7e-6, cache_share=0.94, sustained=1.05, step_seconds=50e-6)
# A CPU's figures are those of graphs/plan/devices.py; nothing more was fitted.
CPU = Calibration()


class Row(NamedTuple):
    """A live row of a step: tokens that it runs, and tokens of it that are cached when the step has ended."""

    tokens: int
    context: int


# What the operations of a launch go by, beside the shapes of the bucket: tokens that are cached, the other tokens of
# the same row in this step, or nothing.
CACHE, OWN, NOTHING = "cache", "own", "nothing"


@dataclass(frozen=True)
class _Kind:
    """Launches that take the same: how many, seconds that the kernel's model says (0: none), and kernel nodes.

    ``reads`` is one of :data:`CACHE`, :data:`OWN` and :data:`NOTHING` that goes by the rows of a step.
    """

    launch: Launch
    count: int
    modelled: float
    nodes: int
    reads: str


class StepTimes:
    """Seconds of steps of a plan, on the device that it was chosen for.

    Args:
        plan: whose steps.
        target: whose rates count for launches without a model; None takes the plan's.
        calibration: None takes that of the plan's kind of device.
    """

    def __init__(
        self, plan: Plan, target: Target | None = None, calibration: Calibration | None = None
    ) -> None:
        self.plan = plan
        self.target = target or target_of(plan)
        self.calibration = calibration or (GPU if self.target.is_cuda else CPU)
        self._tuned = next(
            (
                v
                for k, v in plan.tuned.items()
                if (d := device_named(k)) is not None and d.name == plan.device
            ),
            {},
        )
        self._kinds: dict[Bucket, list[_Kind]] = {}
        self._still: dict[Bucket, float] = {}
        self._full: dict[tuple[Bucket, str, int], float] = {}

    def seconds(self, bucket: Bucket, rows: Sequence[Row]) -> float:
        """Of a step of ``bucket`` with these live rows, from its start to that of the next."""
        device = self._still_seconds(bucket) + math.fsum(
            kind.count * self._rows_seconds(kind, bucket, rows)
            for kind in self._of(bucket)
            if kind.reads != NOTHING
        )
        return self.calibration.sustained * device + self.calibration.step_seconds

    def alike(self, bucket: Bucket, rows: int, context: int) -> float:
        """Of a step whose ``rows`` run one token each and have ``context``."""
        return self.seconds(bucket, [Row(1, context)] * rows)

    def _of(self, bucket: Bucket) -> list[_Kind]:
        if bucket not in self._kinds:
            program, found = self.plan.programs[bucket.phase], Counter[Any]()
            examples: dict[Any, _Kind] = {}
            for call in program.calls(bucket, self._tuned):
                launch = call.launch
                key = launch_key(self.plan, bucket.phase, launch)
                found[key] += 1
                if key not in examples:
                    chosen = program.candidate(launch.op_class, bucket, self._tuned)
                    modelled = 0.0 if chosen is None else 1e-9 * chosen.nanoseconds
                    examples[key] = _Kind(
                        launch, 0, modelled, 1 if chosen is None else len(chosen.nodes), _reads(launch)
                    )
            self._kinds[bucket] = [
                _Kind(k.launch, found[key], k.modelled, k.nodes, k.reads) for key, k in examples.items()
            ]
        return self._kinds[bucket]

    def _still_seconds(self, bucket: Bucket) -> float:
        """Of the launches that do not depend on what is cached."""
        if bucket not in self._still:
            parts = (
                k.count * (k.modelled or self._floor(k, bucket, bucket.sizes, 0, 0) + self._start(k))
                for k in self._of(bucket)
                if k.reads == NOTHING
            )
            self._still[bucket] = math.fsum(parts)
        return self._still[bucket]

    def _start(self, kind: _Kind) -> float:
        return kind.nodes * self.target.launch_seconds

    def _rows_seconds(self, kind: _Kind, bucket: Bucket, rows: Sequence[Row]) -> float:
        """Of one launch that goes by what rows have.

        A model speaks of full buckets at the context of the plan's traffic. What it says beyond a launch's start is
        scaled by the floor, which the live rows have beside that of those that it speaks of. Where they have more,
        the rest takes what it takes in the largest bucket: a small one is further from its floor since it does not
        fill the device, and more work does. Models of attention over what was cached before the step speak of many
        such tokens, and a prompt's first chunk has none: there the floor counts.
        """
        live, start = self._rows_floor(kind, bucket, rows), self._start(kind)
        if not kind.modelled or (kind.reads == CACHE and self._apart(bucket)):
            return live / self.calibration.cache_share + max(start, self.calibration.cache_seconds)
        usual = self._rows_floor(kind, bucket, self._usual(bucket))
        share = max(0.0, kind.modelled - start) / usual
        if live <= usual:
            return start + share * live
        return start + share * usual + min(share, self._filled(kind, bucket)) * (live - usual)

    def _filled(self, kind: _Kind, bucket: Bucket) -> float:
        """Times its floor that a launch takes behind its start in the largest bucket, if it has a model there."""
        largest = max(
            (b for b in self.plan.buckets if b.phase == bucket.phase), key=lambda b: (b.tokens, b.rows)
        )
        at = (largest, kind.launch.op, kind.launch.op_class)
        if at not in self._full:
            same = (k for k in self._of(largest) if (k.launch.op, k.launch.op_class) == at[1:] and k.modelled)
            found = next(same, None)
            self._full[at] = (
                math.inf
                if found is None
                else max(0.0, found.modelled - self._start(found))
                / self._rows_floor(found, largest, self._usual(largest))
            )
        return self._full[at]

    def _apart(self, bucket: Bucket) -> bool:
        """Whether tokens of the step are seen by other launches than what was cached before."""
        return any(kind.reads == OWN for kind in self._of(bucket))

    def _usual(self, bucket: Bucket) -> list[Row]:
        """The rows that kernels' models speak of: full ones where all are alike, else a prompt or a chunk of one."""
        context = min(int(self.plan.options.traffic.get("context", 1024)), self.plan.limits.context_len)
        each = self.plan.steps[bucket.phase].each
        if each is not None:
            return [Row(each, max(context, each))] * bucket.rows
        return [Row(bucket.tokens, max(context, bucket.tokens))]

    def _rows_floor(self, kind: _Kind, bucket: Bucket, rows: Sequence[Row]) -> float:
        """Roofline seconds: bytes go by what rows have cached, operations by what each of their tokens sees."""
        tokens = sum(row.tokens for row in rows)
        if not tokens:
            return 0.0
        sizes = Bucket(bucket.phase, len(rows), tokens).sizes
        if kind.reads == OWN:
            pairs = math.fsum(row.tokens**2 for row in rows) / tokens**2
            return pairs * self._floor(kind, bucket, sizes, 0, 0)
        apart = self._apart(bucket)
        held = math.fsum(row.context - row.tokens * apart for row in rows) / len(rows)
        seen = math.fsum(
            row.tokens * (row.context - row.tokens if apart else row.context - (row.tokens - 1) / 2)
            for row in rows
        )
        return self._floor(kind, bucket, sizes, held, seen / tokens)

    def _floor(self, kind: _Kind, bucket: Bucket, sizes: Any, held: float, seen: float) -> float:
        one: Any = held  # contexts may be means, which contracts' expressions take as they are
        nbytes, flops, rate = work(self.plan, bucket.phase, kind.launch, sizes, one, self.target)
        if seen != held:
            two: Any = seen
            flops = work(self.plan, bucket.phase, kind.launch, sizes, two, self.target)[1]
        return max(float(nbytes) / self.target.bandwidth, float(flops) / rate)


def _reads(launch: Launch) -> str:
    flops = str(contracts()[launch.op].flops)
    return CACHE if "context" in flops else OWN if "T*T" in flops else NOTHING
