"""How much of a step is padding: every legal batch, the bucket it runs in, and what it would have needed.

A decode batch is r rows of one token. A batch of any other phase is r rows with t tokens in all, r ≤ t, up to
the tokens of the phase's largest bucket. Its weight comes from the plan's traffic profile: that of r rows, beyond
decode times that of t tokens, sizes without a weight counting nothing and an empty profile standing for weight
1/size (graphs/plan/buckets.py). Weights are shares of all legal batches of the phase.

For a batch with t tokens in a bucket with B, the padding share of tokens is ``1 - t / B``; the padding
share of time is ``1 - seconds(r, t) / seconds(bucket)``, where seconds(r, t) is the roofline time of a
program made for that very batch, at the traffic profile's context. ``worst`` is the largest over the
batches that map to the bucket, whatever their weight; ``expected`` the mean under their weights. Over a
phase ``expected`` is the padding of all steps over the whole of all steps, so long steps count for more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from makeready.graphs.inspect.analysis import largest_bucket, launch_key, work
from makeready.graphs.inspect.segments import one_token
from makeready.graphs.plan.buckets import BucketTable, Distribution, Traffic
from makeready.graphs.plan.codec import from_json
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Launch
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import target_of
from makeready.kernels.spec import ROWS, TOKENS


@dataclass(frozen=True)
class Share:
    """Padding as a share of one; None where no batch, or none of any weight, comes to the bucket."""

    worst: float | None
    expected: float | None


@dataclass(frozen=True)
class Waste:
    """Padding of one bucket, or of all of a phase.

    Attributes:
        batches: legal batches that map to it.
        rows, tokens: smallest and largest of any of them; (0, 0) without batches.
        weight: share of the phase's steps that traffic is expected to send here.
        token: padding share of tokens.
        time: padding share of step time.
    """

    batches: int
    rows: tuple[int, int]
    tokens: tuple[int, int]
    weight: float
    token: Share
    time: Share


@dataclass(frozen=True)
class Cell:
    """Batches with ``rows[0]..rows[1]`` rows and ``tokens[0]..tokens[1]`` tokens, which share a bucket."""

    rows: tuple[int, int]
    tokens: tuple[int, int]
    bucket: Bucket


@dataclass(frozen=True)
class Padding:
    """All that is said about padding; ``cells`` are the rectangles that hold a legal batch, by phase."""

    buckets: Mapping[Bucket, Waste]
    phases: Mapping[str, Waste]
    cells: Mapping[str, tuple[tuple[Cell, Waste], ...]]


def traffic_of(plan: Plan) -> Traffic:
    """The traffic profile that the plan was made for."""
    return from_json(Traffic, plan.options.traffic)


def cells(plan: Plan, phase: str) -> tuple[Cell, ...]:
    """The phase's batches as rectangles of one bucket each; beyond decode with illegal ones (tokens < rows).

    A bucket covers by two upper bounds, so all batches between two neighbouring bounds have the same ones
    to choose from, and looking up the largest of them answers for all.
    """
    table, mine = BucketTable(plan.buckets), [b for b in plan.buckets if b.phase == phase]
    if one_token(plan, phase):
        spans = _between([b.rows for b in mine])
        return tuple(Cell(s, s, table.covering(phase, s[1], s[1])) for s in spans)
    pairs = product(_between([b.rows for b in mine]), _between([b.tokens for b in mine]))
    return tuple(Cell(r, t, table.covering(phase, r[1], t[1])) for r, t in pairs if r[0] <= t[1])


def padding(plan: Plan) -> Padding:
    """Padding under the plan's own traffic profile; definitions above."""
    traffic = traffic_of(plan)
    buckets: dict[Bucket, Waste] = {}
    phases: dict[str, Waste] = {}
    held: dict[str, tuple[tuple[Cell, Waste], ...]] = {}
    for phase in plan.programs:
        grid, found = _Grid(plan, phase, traffic), cells(plan, phase)
        for bucket in (b for b in plan.buckets if b.phase == phase):
            buckets[bucket] = grid.waste([c for c in found if c.bucket == bucket])
        phases[phase] = grid.waste(found)
        each = ((cell, grid.waste([cell])) for cell in found)
        held[phase] = tuple((cell, waste) for cell, waste in each if waste.batches)
    return Padding(buckets, phases, held)


def _between(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of whole numbers that end in each of ``bounds``, from 1."""
    ends = [0, *sorted(set(bounds))]
    return [(low + 1, high) for low, high in pairwise(ends)]


class _Grid:
    """Weights and exact step times of all batches of a phase, as arrays [rows, tokens].

    Index 0 stands for size 1. Decode is a single column: tokens follow from rows.
    """

    def __init__(self, plan: Plan, phase: str, traffic: Traffic) -> None:
        self.decode = one_token(plan, phase)
        rows = np.arange(1, plan.limits.max_rows + 1)[:, None]
        tokens = rows if self.decode else np.arange(1, largest_bucket(plan, phase).tokens + 1)[None, :]
        weight = _weights(traffic.decode_rows if self.decode else traffic.extend_rows, rows)
        if not self.decode:
            weight = weight * _weights(traffic.extend_tokens, tokens)
        self.rows, self.tokens = np.broadcast_arrays(rows, tokens)
        self.legal = self.tokens >= self.rows
        weight = weight * self.legal
        self.weight = weight / (weight.sum() or 1.0)
        self.seconds = np.broadcast_to(_step_seconds(plan, phase, rows, tokens, traffic), self.rows.shape)

    def waste(self, chosen: Sequence[Cell]) -> Waste:
        """Padding over the legal batches of ``chosen``."""
        found = [np.zeros((6, 0)), *(self._batches(cell) for cell in chosen)]
        rows, tokens, seconds, weight, all_tokens, all_seconds = np.concatenate(found, axis=1)
        return Waste(
            batches=len(rows),
            rows=_extent(rows),
            tokens=_extent(tokens),
            weight=float(weight.sum()),
            token=_share(tokens, all_tokens, weight),
            time=_share(seconds, all_seconds, weight),
        )

    def _batches(self, cell: Cell) -> np.ndarray:
        """[6, batches]: rows, tokens, seconds, weight of each, and the bucket's tokens and seconds."""
        (r0, r1), (t0, t1) = cell.rows, (1, 1) if self.decode else cell.tokens
        at = np.s_[r0 - 1 : r1, t0 - 1 : t1]
        legal = self.legal[at]
        own = [x[at][legal] for x in (self.rows, self.tokens, self.seconds, self.weight)]
        full = self.seconds[cell.bucket.rows - 1, 0 if self.decode else cell.bucket.tokens - 1]
        return np.stack([*own, *(np.full(len(own[0]), x, float) for x in (cell.bucket.tokens, full))])


def _extent(sizes: np.ndarray) -> tuple[int, int]:
    return (int(sizes.min()), int(sizes.max())) if sizes.size else (0, 0)


def _share(used: np.ndarray, whole: np.ndarray, weight: np.ndarray) -> Share:
    if not used.size:
        return Share(None, None)
    expected = 1 - float(weight @ used) / float(weight @ whole) if weight.any() else None
    return Share(float((1 - used / whole).max()), expected)


def _weights(distribution: Distribution, sizes: np.ndarray) -> np.ndarray:
    if not distribution:
        return 1.0 / sizes
    return np.vectorize(lambda size: distribution.get(int(size), 0.0), otypes=[float])(sizes)


def _step_seconds(
    plan: Plan, phase: str, rows: np.ndarray, tokens: np.ndarray, traffic: Traffic
) -> np.ndarray:
    """Roofline time of a program made for each batch; broadcasts like ``rows`` and ``tokens``."""
    program, target = plan.programs[phase], target_of(plan)
    context = min(traffic.context, plan.limits.context_len)
    sizes = {ROWS: rows, TOKENS: tokens}
    kinds: dict[tuple, list[Launch]] = {}
    for launch in program.launches:
        kinds.setdefault(launch_key(plan, phase, launch), []).append(launch)
    total = np.zeros((1, 1))
    for same in kinds.values():
        nbytes, flops, rate = work(plan, phase, same[0], sizes, context, target)
        bound = np.maximum(nbytes / target.bandwidth, flops / rate)
        total = total + len(same) * (bound + target.launch_seconds)
    return total
