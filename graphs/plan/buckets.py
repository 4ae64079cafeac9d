"""Which batch shapes get a program, and the proof that no legal batch is without one."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import Bucket, StepSpec

Distribution: TypeAlias = Mapping[int, float]
"""Weight of each size; need not sum to one."""


@dataclass(frozen=True)
class Traffic:
    """The batches that a plan expects; they decide where buckets are dense, never what is legal.

    Attributes:
        decode_rows: how often a decode step has so many rows.
        extend_tokens: how often an extend step has so many tokens.
        extend_rows: how often an extend step has so many rows.
        context: tokens of context a row, for the cost of attention.

    An empty distribution stands for every size up to the limit with weight 1/size, which makes each
    doubling equally likely; powers of two, which people choose, weigh as much as all sizes between two of them.
    """

    decode_rows: Distribution = field(default_factory=dict)
    extend_tokens: Distribution = field(default_factory=dict)
    extend_rows: Distribution = field(default_factory=dict)
    context: int = 1024


@dataclass(frozen=True)
class Shapes:
    """What batches of a kind of step are expected, and into how many buckets they may be cut.

    Attributes:
        rows, tokens: how often a step has this many; tokens mean nothing where every row has the same number.
        count: of buckets, at most.
        row_counts: of these, at most this many differ in rows; None is any number.
    """

    rows: Distribution = field(default_factory=dict)
    tokens: Distribution = field(default_factory=dict)
    count: int = 16
    row_counts: int | None = None


def choose_buckets(
    kind: str, step: StepSpec, shapes: Shapes, seconds: Callable[[Bucket], float]
) -> tuple[Bucket, ...]:
    """Buckets of a kind of step that minimise the expected step time; its largest batch is always one.

    Where every row has the same number of tokens and one row alone is expected, it has a bucket of its own: kernels
    for a single row are others, and faster than ``seconds``, which counts bytes and operations, knows.

    Args:
        step: the kind's declaration. Where rows differ in length, buckets are a grid of rows × tokens.
        shapes: what to expect.
        seconds: step time of a bucket.
    """
    rows, tokens = step.rows, step.tokens
    if step.each is not None:
        each = step.each
        expected, count, alone = _filled(shapes.rows, rows), shapes.count, []
        if rows > 1 and count > 1 and expected.get(1):
            alone, expected, count = [1], {size: w for size, w in expected.items() if size > 1}, count - 1
        sizes = _cut(expected, rows, count, lambda r: seconds(Bucket(kind, r, r * each)))
        return tuple(Bucket(kind, r, r * each) for r in sorted({*alone, *sizes}))
    row_counts = 1 if rows == 1 else min(shapes.row_counts or shapes.count, shapes.count)
    by_rows = [rows]
    if row_counts > 1:
        by_rows = _cut(
            _filled(shapes.rows, rows),
            rows,
            row_counts,
            lambda r: seconds(Bucket(kind, r, max(r, tokens // 8))),
        )
    by_tokens = _cut(
        _filled(shapes.tokens, tokens),
        tokens,
        max(1, shapes.count // row_counts),
        lambda t: seconds(Bucket(kind, min(t, rows), t)),
    )
    return tuple(sorted({Bucket(kind, min(r, t), t) for r in by_rows for t in by_tokens}))


def _filled(distribution: Distribution, most: int) -> Distribution:
    unknown = [size for size in distribution if not 1 <= size <= most]
    if unknown:
        raise PlanError(f"the traffic profile expects a size of {unknown[0]}; sizes go from 1 to {most}")
    negative = [size for size, weight in distribution.items() if not 0 <= weight < math.inf]
    if negative:
        raise PlanError(
            f"the traffic profile gives size {negative[0]} the weight {distribution[negative[0]]}; "
            "weights are numbers of at least 0"
        )
    return distribution or {n: math.log(2) if n & (n - 1) == 0 else 1 / n for n in range(1, most + 1)}


def _cut(distribution: Distribution, most: int, count: int, seconds: Callable[[int], float]) -> list[int]:
    """At most ``count`` sizes ending in ``most``, each batch rounded up to the next, at least expected time.

    Exact dynamic programming over candidate sizes: ``best[j]`` is the least expected time of all batches
    up to candidate j when j is chosen; one sweep for each further size.
    """
    candidates = _candidates(most)
    cost = [seconds(size) for size in candidates]
    mass = [0.0] * (len(candidates) + 1)  # mass[j]: weight of batches that need less than candidate j
    for size, weight in distribution.items():
        mass[bisect_left(candidates, size) + 1] += weight
    for j in range(len(candidates)):
        mass[j + 1] += mass[j]
    best = [mass[j + 1] * cost[j] for j in range(len(candidates))]
    chosen: list[tuple[int, ...]] = [(j,) for j in range(len(candidates))]
    for _ in range(min(count, len(candidates)) - 1):
        previous, paths = best[:], chosen[:]
        for j in range(len(candidates)):
            for i in range(j):
                total = previous[i] + (mass[j + 1] - mass[i + 1]) * cost[j]
                if total < best[j] * (1 - 1e-9):
                    best[j], chosen[j] = total, (*paths[i], j)
    return [candidates[j] for j in chosen[-1]]


def _candidates(most: int) -> list[int]:
    """Sizes worth a bucket: every one up to 16, then 16 to each doubling, and ``most`` itself."""
    sizes, step = list(range(1, min(most, 16) + 1)), 1
    while sizes[-1] < most:
        step *= 2
        sizes += range(sizes[-1] + step, min(most, 2 * sizes[-1]) + 1, step) or [most]
    return sorted({*(s for s in sizes if s <= most), most})


def uncovered(buckets: Sequence[Bucket], kind: str, step: StepSpec) -> Iterator[tuple[int, int]]:
    """Legal (rows, tokens) batches of ``kind`` that no bucket covers, smallest row counts first.

    For a given number of rows what is covered is every token count up to the most that a bucket with at least
    these rows has, so it is enough to look at where that bound changes, and at the first count above it.
    """
    mine = [b for b in buckets if b.phase == kind]
    for rows in sorted({1, step.rows, *(b.rows + 1 for b in mine)}):
        if rows > step.rows:
            continue
        most = max((b.tokens for b in mine if b.rows >= rows), default=0)
        wanted = step.tokens if step.each is None else rows * step.each
        if most < wanted:
            yield rows, max(rows, most + 1) if step.each is None else wanted


def prove_coverage(buckets: Sequence[Bucket], steps: Mapping[str, StepSpec]) -> None:
    """Check that every batch that ``steps`` allow has a bucket.

    Raises:
        PlanError: naming the smallest batch that has none, or the bucket that no batch may fill.
    """
    for kind, step in steps.items():
        if step.tokens < step.rows:
            raise PlanError(
                f"{kind} steps of {step.tokens} tokens are below {step.rows} rows: a step must have room for one "
                "token of every row; raise plan.max_tokens"
            )
    for bucket in buckets:
        step = steps.get(bucket.phase)
        if step is None or not step.legal(bucket.rows, bucket.tokens):
            raise PlanError(f"bucket {bucket} is outside the limits of the plan's steps")
    if len(set(buckets)) != len(buckets):
        raise PlanError("a bucket is listed twice: a batch must have exactly one")
    for kind, step in steps.items():
        for rows, tokens in uncovered(buckets, kind, step):
            raise PlanError(
                f"no {kind} bucket covers {rows} rows with {tokens} tokens, which the limits allow; "
                f"add a bucket or lower plan.max_rows or plan.max_tokens"
            )


class BucketTable:
    """Looks up the one bucket of a batch; never compiles, never falls back."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._by_phase = {
            phase: sorted((b for b in buckets if b.phase == phase), key=lambda b: (b.tokens, b.rows))
            for phase in {bucket.phase for bucket in buckets}
        }

    def covering(self, phase: str, rows: int, tokens: int) -> Bucket:
        """The bucket with the fewest tokens, then rows, that covers the batch.

        Raises:
            PlanError: the batch is over the limits that the plan was made for.
        """
        buckets = self._by_phase[phase]
        for bucket in buckets:
            if bucket.covers(rows, tokens):
                return bucket
        most_rows, most_tokens = max(b.rows for b in buckets), max(b.tokens for b in buckets)
        raise PlanError(
            f"{rows} rows with {tokens} tokens exceed the largest compiled {phase} bucket "
            f"({most_rows} rows, {most_tokens} tokens); recompile with plan.max_rows={max(rows, most_rows)} "
            f"plan.max_tokens={max(tokens, most_tokens)}"
        )
