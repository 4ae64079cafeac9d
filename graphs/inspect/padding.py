"""How much of a step is padding: every legal batch, the bucket it runs in, and what it would have needed.

A decode batch is r rows of one token. An extend batch is r rows with t tokens in all, r ≤ t. Its weight
comes from the plan's traffic profile: that of r rows, for extend times that of t tokens, sizes without a
weight counting nothing and an empty profile standing for weight 1/size (graphs/buckets.py). Weights are
shares of all legal batches of the phase.

For a batch with t tokens in a bucket with B, the padding share of tokens is ``1 - t / B``; the padding
share of time is ``1 - seconds(r, t) / seconds(bucket)``, where seconds(r, t) is the roofline time of a
program made for that very batch, at the traffic profile's context. ``worst`` is the largest over the
batches that map to the bucket, whatever their weight; ``expected`` the mean under their weights. Over a
phase ``expected`` is the padding of all steps over the whole of all steps, so long steps count for more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from makeready.graphs.buckets import BucketTable, Distribution, Traffic
from makeready.graphs.codec import from_json
from makeready.graphs.inspect.analysis import launch_key, work
from makeready.graphs.plan import Plan
from makeready.graphs.spec import DECODE, EXTEND, Bucket
from makeready.graphs.targets import find_target


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


def traffic_of(plan: Plan) -> Traffic:
    """The traffic profile that the plan was made for."""
    return from_json(Traffic, plan.options.traffic, "options.traffic")


def cells(plan: Plan, phase: str) -> tuple[Cell, ...]:
    """The phase's batches as rectangles of one bucket each; extend's still hold illegal ones (tokens < rows).

    A bucket covers by two upper bounds, so all batches between two neighbouring bounds have the same ones
    to choose from, and looking up the largest of them answers for all.
    """
    table, mine = BucketTable(plan.buckets), [b for b in plan.buckets if b.phase == phase]
    if phase == DECODE:
        spans = _between([b.rows for b in mine])
        return tuple(Cell(s, s, table.covering(phase, s[1], s[1])) for s in spans)
    pairs = product(_between([b.rows for b in mine]), _between([b.tokens for b in mine]))
    return tuple(Cell(r, t, table.covering(phase, r[1], t[1])) for r, t in pairs if r[0] <= t[1])


def padding_waste(plan: Plan) -> dict[Bucket, Waste]:
    """Padding of every bucket under the plan's own traffic profile; definitions above."""
    traffic = traffic_of(plan)
    waste: dict[Bucket, Waste] = {}
    for phase in (DECODE, EXTEND):
        grid = _Grid(plan, phase, traffic)
        for bucket in (b for b in plan.buckets if b.phase == phase):
            mine = [c for c in cells(plan, phase) if c.bucket == bucket]
            waste[bucket] = grid.waste(mine)
    return waste


def phase_waste(plan: Plan, phase: str) -> Waste:
    """Padding over all steps of a phase."""
    return _Grid(plan, phase, traffic_of(plan)).waste(cells(plan, phase))


def cell_waste(plan: Plan, phase: str) -> list[tuple[Cell, Waste]]:
    """Every rectangle of :func:`cells` that holds a legal batch, with its own padding."""
    grid = _Grid(plan, phase, traffic_of(plan))
    found = [(cell, grid.waste([cell])) for cell in cells(plan, phase)]
    return [(cell, waste) for cell, waste in found if waste.batches]


def _between(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of whole numbers that end in each of ``bounds``, from 1."""
    ends = [0, *sorted(set(bounds))]
    return [(low + 1, high) for low, high in pairwise(ends)]


class _Grid:
    """Weights and exact step times of all batches of a phase, as arrays [rows, tokens].

    Index 0 stands for size 1. Decode is a single column: tokens follow from rows.
    """

    def __init__(self, plan: Plan, phase: str, traffic: Traffic) -> None:
        self.decode = phase == DECODE
        rows = np.arange(1, plan.limits.max_rows + 1)
        tokens = np.arange(1, plan.limits.max_tokens + 1)
        if self.decode:
            self.tokens = rows[:, None]
            self.legal = np.ones_like(self.tokens, bool)
            weight = _weights(traffic.decode_rows, rows)[:, None]
        else:
            self.tokens = np.broadcast_to(tokens, (len(rows), len(tokens)))
            self.legal = self.tokens >= rows[:, None]
            weight = np.outer(_weights(traffic.extend_rows, rows), _weights(traffic.extend_tokens, tokens))
        weight = weight * self.legal
        self.weight = weight / (weight.sum() or 1.0)
        self.seconds = _step_seconds(plan, phase, traffic.context)

    def waste(self, chosen: Sequence[Cell]) -> Waste:
        """Padding over the legal batches of ``chosen``."""
        parts = [self._part(cell) for cell in chosen]
        batches = sum(p["batches"] for p in parts)
        if not batches:
            return Waste(0, (0, 0), (0, 0), 0.0, Share(None, None), Share(None, None))
        parts = [p for p in parts if p["batches"]]
        return Waste(
            batches=int(batches),
            rows=(min(p["rows"][0] for p in parts), max(p["rows"][1] for p in parts)),
            tokens=(min(p["tokens"][0] for p in parts), max(p["tokens"][1] for p in parts)),
            weight=math.fsum(p["weight"] for p in parts),
            token=_share(parts, "token"),
            time=_share(parts, "time"),
        )

    def _part(self, cell: Cell) -> dict:
        """Sums over one rectangle."""
        (r0, r1), (t0, t1) = cell.rows, (1, 1) if self.decode else cell.tokens
        at = (slice(r0 - 1, r1), slice(t0 - 1, t1))
        legal, weight, tokens, time = (x[at] for x in (self.legal, self.weight, self.tokens, self.seconds))
        if not legal.any():
            return {"batches": 0}
        rows = np.nonzero(legal.any(1))[0] + r0
        full = cell.bucket.rows - 1, 0 if self.decode else cell.bucket.tokens - 1
        part: dict = {
            "batches": int(legal.sum()),
            "rows": (int(rows[0]), int(rows[-1])),
            "tokens": (int(tokens[legal].min()), int(tokens[legal].max())),
            "weight": float(weight.sum()),
        }
        for name, used, whole in (
            ("token", tokens, float(cell.bucket.tokens)),
            ("time", time, float(self.seconds[full])),
        ):
            part[name] = {
                "worst": 1 - float(used[legal].min()) / whole,
                "used": float((weight * used).sum()),
                "whole": float(weight.sum()) * whole,
            }
        return part


def _share(parts: Sequence[dict], name: str) -> Share:
    whole = math.fsum(p[name]["whole"] for p in parts)
    used = math.fsum(p[name]["used"] for p in parts)
    # Sums of the same batches in another order may differ in the last digit.
    return Share(max(p[name]["worst"] for p in parts), max(0.0, 1 - used / whole) if whole else None)


def _weights(distribution: Distribution, sizes: np.ndarray) -> np.ndarray:
    if not distribution:
        return 1.0 / sizes
    return np.array([distribution.get(int(size), 0.0) for size in sizes])


def _step_seconds(plan: Plan, phase: str, context: int) -> np.ndarray:
    """Roofline time of a program made for each batch, [rows, tokens] ([rows, 1] for decode).

    Bytes and operations of a launch are polynomials of the rows and tokens, of degree two at most in
    either (attention among a step's own tokens). Nine evaluations of the cost model therefore give every
    batch's; the roofline's maximum is taken behind that.
    """
    program, target = plan.programs[phase], find_target(plan.target)
    context = min(context, plan.limits.context_len)
    counts: dict[tuple, list] = {}
    for launch in program.launches:
        counts.setdefault(launch_key(plan, phase, launch), [launch, 0])[1] += 1
    rows = np.arange(1, plan.limits.max_rows + 1)
    tokens = rows if phase == DECODE else np.arange(1, plan.limits.max_tokens + 1)
    total: np.ndarray | float = 0.0
    for launch, times in counts.values():

        def of(r: int, t: int, launch=launch) -> tuple[float, ...]:
            return work(plan, launch, Bucket(phase, r, t), context, target)

        nbytes, _, compute = (_spread(of, part, rows, tokens, phase) for part in range(3))
        total = total + times * (np.maximum(nbytes / target.bandwidth, compute) + target.launch_seconds)
    return np.asarray(total)


def _spread(
    of: Callable[[int, int], tuple[float, ...]], part: int, rows: np.ndarray, tokens: np.ndarray, phase: str
) -> np.ndarray:
    """A polynomial of degree two in each size, known at sizes 1 to 3, at all sizes (Newton's differences)."""
    known = np.array([[of(r, t)[part] for t in (1, 2, 3)] for r in (1, 2, 3)])
    differences = np.array([[1.0, 0, 0], [-1, 1, 0], [1, -2, 1]])
    coefficients = differences @ known @ differences.T
    by_rows, by_tokens = (
        np.stack([np.ones(len(x)), x - 1.0, (x - 1.0) * (x - 2.0) / 2]) for x in (rows, tokens)
    )
    if phase == DECODE:
        return np.einsum("ir,ij,jr->r", by_rows, coefficients, by_tokens)[:, None]
    return by_rows.T @ coefficients @ by_tokens
