"""Which batch shapes get a program, and the proof that no legal batch is without one."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from makeready.graphs.plan import PlanError
from makeready.graphs.spec import DECODE, EXTEND, PHASES, SCORE, Bucket, Limits

Distribution: TypeAlias = Mapping[int, float]
"""Weight of each size; need not sum to one."""

SCORE_BUCKETS = 4


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


def choose_buckets(
    limits: Limits,
    traffic: Traffic,
    seconds: Mapping[str, Callable[[Bucket], float]],
    *,
    max_decode: int,
    max_extend: int,
    row_counts: int = 3,
) -> tuple[Bucket, ...]:
    """Buckets of the limits' phases that minimise the expected step time, within the given counts.

    Args:
        limits: the largest batch; its exact shape is always a bucket.
        traffic: what to expect.
        seconds: step time of a bucket, by phase.
        max_decode: at most so many decode buckets.
        max_extend: at most so many extend buckets, a grid of rows × tokens; for ``score``, whose steps are
            mostly full, at most :data:`SCORE_BUCKETS` of them.
        row_counts: of which at most so many differ in rows; few where padding rows cost little, which
            leaves more for tokens.
    """
    rows, tokens = limits.max_rows, limits.max_tokens
    decode = _cut(
        _filled(traffic.decode_rows, rows), rows, max_decode, lambda r: seconds[DECODE](Bucket(DECODE, r, r))
    )
    row_counts = 1 if rows == 1 else min(row_counts, max_extend)
    by_rows = _cut(
        _filled(traffic.extend_rows, rows),
        rows,
        row_counts,
        lambda r: seconds[EXTEND](Bucket(EXTEND, r, max(r, tokens // 8))),
    )
    by_tokens = _cut(
        _filled(traffic.extend_tokens, tokens),
        tokens,
        max(1, max_extend // row_counts),
        lambda t: seconds[EXTEND](Bucket(EXTEND, min(t, rows), t)),
    )
    buckets = [Bucket(DECODE, r, r) for r in decode]
    buckets += {Bucket(EXTEND, min(r, t), t) for r in by_rows for t in by_tokens}
    if SCORE in limits.phases:
        most = limits.most_tokens(SCORE)
        scored = _cut(
            _filled({}, most),
            most,
            min(max_extend, SCORE_BUCKETS),
            lambda t: seconds[SCORE](Bucket(SCORE, min(t, rows), t)),
        )
        buckets += [Bucket(SCORE, min(t, rows), t) for t in scored]
    return tuple(sorted(buckets))


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


def uncovered(buckets: Sequence[Bucket], limits: Limits, phase: str) -> Iterator[tuple[int, int]]:
    """Legal (rows, tokens) batches of ``phase`` that no bucket covers, smallest row counts first.

    A decode batch has one token a row; others at least one and at most ``limits.most_tokens`` in all. For
    a given number of rows what is covered is every token count up to the most that a bucket with so many
    rows has, so it is enough to look at where that bound changes, and at the first count above it.
    """
    mine = [b for b in buckets if b.phase == phase]
    for rows in sorted({1, limits.max_rows, *(b.rows + 1 for b in mine)}):
        if rows > limits.max_rows:
            continue
        most = max((b.tokens for b in mine if b.rows >= rows), default=0)
        wanted = rows if phase == DECODE else limits.most_tokens(phase)
        if most < wanted:
            yield rows, max(rows, most + 1)


def prove_coverage(buckets: Sequence[Bucket], limits: Limits) -> None:
    """Check that every batch that ``limits`` allow has a bucket.

    Raises:
        PlanError: naming the smallest batch that has none, or the bucket that no batch may fill.
    """
    if limits.max_tokens < limits.max_rows:
        raise PlanError(
            f"max_tokens={limits.max_tokens} is below max_rows={limits.max_rows}: "
            "a step must have room for one token of every row; raise plan.max_tokens"
        )
    for bucket in buckets:
        legal = bucket.rows == bucket.tokens if bucket.phase == DECODE else bucket.rows <= bucket.tokens
        if not legal or bucket.rows > limits.max_rows or bucket.tokens > limits.most_tokens(bucket.phase):
            raise PlanError(f"bucket {bucket} is outside the limits {limits}")
    if len(set(buckets)) != len(buckets):
        raise PlanError("a bucket is listed twice: a batch must have exactly one")
    for phase in limits.phases:
        for rows, tokens in uncovered(buckets, limits, phase):
            raise PlanError(
                f"no {phase} bucket covers {rows} rows with {tokens} tokens, which the limits allow; "
                f"add a bucket or lower plan.max_rows or plan.max_tokens"
            )


class BucketTable:
    """Looks up the one bucket of a batch; never compiles, never falls back."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._by_phase = {
            phase: sorted((b for b in buckets if b.phase == phase), key=lambda b: (b.tokens, b.rows))
            for phase in PHASES
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
