"""Padding against brute force: every legal batch by itself, its bucket by the rule and not by the table."""

from __future__ import annotations

import math

import pytest
from inspect_plans import make_plan

from makeready.graphs.inspect.analysis import launch_costs
from makeready.graphs.inspect.padding import padding, traffic_of
from makeready.graphs.plan.buckets import Traffic
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket

TRAFFICS = {
    "default": Traffic(),
    "given": Traffic(
        decode_rows={2: 3.0, 5: 1.0},
        extend_tokens={1: 1.0, 9: 2.0, 20: 5.0},
        extend_rows={1: 4.0, 3: 1.0},
        context=33,
    ),
}


def batches(plan: Plan, phase: str, traffic: Traffic) -> list[tuple[int, int, float]]:
    """(rows, tokens, weight), weights adding up to one."""
    limits = plan.limits

    def weight(profile, size: int) -> float:
        return profile.get(size, 0.0) if profile else 1 / size

    if phase == DECODE:
        found = [(r, r, weight(traffic.decode_rows, r)) for r in range(1, limits.max_rows + 1)]
    else:
        found = [
            (r, t, weight(traffic.extend_rows, r) * weight(traffic.extend_tokens, t))
            for r in range(1, limits.max_rows + 1)
            for t in range(r, limits.max_tokens + 1)
        ]
    whole = math.fsum(w for *_, w in found)
    return [(r, t, w / whole) for r, t, w in found]


def bucket_of(plan: Plan, phase: str, rows: int, tokens: int) -> Bucket:
    fitting = [b for b in plan.buckets if b.phase == phase and b.rows >= rows and b.tokens >= tokens]
    return min(fitting, key=lambda b: (b.tokens, b.rows))


def step_seconds(plan: Plan, bucket: Bucket, context: int) -> float:
    return math.fsum(c.seconds for c in launch_costs(plan, bucket, context))


@pytest.mark.parametrize("name", TRAFFICS)
def test_padding_is_that_of_every_batch(name):
    traffic = TRAFFICS[name]
    plan = make_plan(max_decode_buckets=2, max_extend_buckets=6, traffic=traffic)
    assert traffic_of(plan) == traffic
    waste = padding(plan).buckets
    assert set(waste) == set(plan.buckets)
    for phase in (DECODE, EXTEND):
        mine: dict[Bucket, list[tuple[int, int, float]]] = {b: [] for b in plan.buckets if b.phase == phase}
        for rows, tokens, weight in batches(plan, phase, traffic):
            mine[bucket_of(plan, phase, rows, tokens)].append((rows, tokens, weight))
        used = run = 0.0
        for bucket, found in mine.items():
            got, full = waste[bucket], step_seconds(plan, bucket, traffic.context)
            rows, tokens, weights = zip(*found, strict=True)
            assert got.batches == len(found)
            assert got.rows == (min(rows), max(rows))
            assert got.tokens == (min(tokens), max(tokens))
            assert got.weight == pytest.approx(math.fsum(weights))
            token = [1 - t / bucket.tokens for t in tokens]
            time = [1 - step_seconds(plan, Bucket(phase, r, t), traffic.context) / full for r, t, _ in found]
            for share, each in ((got.token, token), (got.time, time)):
                assert share.worst == pytest.approx(max(each))
                if not any(weights):
                    assert share.expected is None
                else:
                    mean = sum(w * x for w, x in zip(weights, each, strict=True)) / sum(weights)
                    assert share.expected == pytest.approx(mean, abs=1e-12)
            used += sum(w * t for _, t, w in found)
            run += sum(w * bucket.tokens for *_, w in found)
        assert padding(plan).phases[phase].token.expected == pytest.approx(1 - used / run, abs=1e-12)
        assert padding(plan).phases[phase].weight == pytest.approx(1)


def test_cells_hold_each_legal_batch_once():
    plan = make_plan(max_decode_buckets=2, max_extend_buckets=6)
    for phase in (DECODE, EXTEND):
        seen = []
        for cell, waste in padding(plan).cells[phase]:
            inside = [
                (r, t)
                for r in range(cell.rows[0], cell.rows[1] + 1)
                for t in range(cell.tokens[0], cell.tokens[1] + 1)
                if (t == r if phase == DECODE else t >= r)
            ]
            assert len(inside) == waste.batches
            assert {bucket_of(plan, phase, r, t) for r, t in inside} == {cell.bucket}
            seen += inside
        assert sorted(seen) == [(r, t) for r, t, _ in batches(plan, phase, Traffic())]


def test_a_plan_of_one_row_and_one_bucket():
    plan = make_plan(max_rows=1, max_tokens=5, max_decode_buckets=1, max_extend_buckets=1)
    waste = padding(plan).buckets[Bucket(EXTEND, 1, 5)]
    assert (waste.batches, waste.rows, waste.tokens) == (5, (1, 1), (1, 5))
    assert waste.token.worst == pytest.approx(4 / 5)
    # Weight 1/t makes the expected tokens 5 / H(5).
    assert waste.token.expected == pytest.approx(1 - 1 / sum(1 / t for t in range(1, 6)))
