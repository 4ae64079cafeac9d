"""Buckets: the coverage proof and the look-up against enumeration, the choice against exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from makeready.graphs.plan import buckets as module
from makeready.graphs.plan.buckets import BucketTable, Shapes, choose_buckets, prove_coverage, uncovered
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket, StepSpec

PAIRS = "pairs"  # steps of two tokens in every row
KINDS = (DECODE, EXTEND, PAIRS)


def steps_of(rows: int, tokens: int, paired: int = 0) -> dict[str, StepSpec]:
    made = {
        DECODE: StepSpec(rows, rows, 1, (), ()),
        EXTEND: StepSpec(rows, tokens, None, (), ()),
    }
    return made | ({PAIRS: StepSpec(paired, 2 * paired, 2, (), ())} if paired else {})


STEPS = (
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 4))
    .filter(lambda p: p[0] <= p[1])
    .map(lambda p: steps_of(*p))
)
ANY_BUCKET = st.builds(Bucket, st.sampled_from(KINDS), st.integers(1, 8), st.integers(1, 11))
EACH = {DECODE: 1, PAIRS: 2}
LEGAL_BUCKET = ANY_BUCKET.map(
    lambda b: Bucket(b.phase, b.rows, b.rows * EACH.get(b.phase, 0) or max(b.rows, b.tokens))
)


def legal(steps: dict[str, StepSpec], kind: str) -> list[tuple[int, int]]:
    """Every batch that the limits allow, smallest row counts first."""
    step = steps[kind]
    if kind in EACH:
        return [(r, r * EACH[kind]) for r in range(1, step.rows + 1)]
    return [(r, t) for r in range(1, step.rows + 1) for t in range(r, step.tokens + 1)]


def missing(buckets: Sequence[Bucket], steps: dict[str, StepSpec], phase: str) -> list[tuple[int, int]]:
    mine = [b for b in buckets if b.phase == phase]
    return [batch for batch in legal(steps, phase) if not any(b.covers(*batch) for b in mine)]


@settings(max_examples=200)
@given(st.lists(LEGAL_BUCKET, max_size=7), STEPS)
def test_the_proof_finds_the_smallest_uncovered_batch(buckets, steps):
    for phase, step in steps.items():
        wrong = missing(buckets, steps, phase)
        found = list(uncovered(buckets, phase, step))
        assert set(found) <= set(wrong)
        assert found[:1] == wrong[:1]


@settings(max_examples=200)
@given(st.lists(ANY_BUCKET, max_size=7), STEPS)
@example([Bucket(DECODE, 8, 2)], steps_of(5, 5))
def test_the_proof_holds_for_illegal_buckets_too(buckets, steps):
    for phase, step in steps.items():
        wrong = missing(buckets, steps, phase)
        found = list(uncovered(buckets, phase, step))
        assert set(found) <= set(wrong)
        assert bool(found) == bool(wrong)


@settings(max_examples=200)
@given(st.lists(st.one_of(LEGAL_BUCKET, ANY_BUCKET), max_size=6), STEPS)
def test_a_set_is_accepted_if_and_only_if_it_covers_everything(buckets, steps):
    most = [Bucket(kind, step.rows, step.tokens) for kind, step in steps.items()]
    for given_set in (buckets, [*buckets, *most], most):
        sound = (
            len(set(given_set)) == len(given_set)
            and all(b.phase in steps and (b.rows, b.tokens) in legal(steps, b.phase) for b in given_set)
            and not any(missing(given_set, steps, kind) for kind in steps)
        )
        if sound:
            prove_coverage(given_set, steps)
        else:
            with pytest.raises(PlanError):
                prove_coverage(given_set, steps)


def test_errors_name_the_batch_and_the_remedy():
    limits = steps_of(4, 8)
    decode, extend = Bucket(DECODE, 4, 4), Bucket(EXTEND, 4, 8)
    prove_coverage([decode, extend], limits)
    with pytest.raises(PlanError, match=r"no extend bucket covers 3 rows with 7 tokens.*plan\.max_rows"):
        prove_coverage([decode, Bucket(EXTEND, 2, 8), Bucket(EXTEND, 4, 6)], limits)
    with pytest.raises(PlanError, match="no decode bucket covers 1 rows with 1 tokens"):
        prove_coverage([extend], limits)
    with pytest.raises(PlanError, match="bucket decode-5 is outside the limits"):
        prove_coverage([decode, extend, Bucket(DECODE, 5, 5)], limits)
    with pytest.raises(PlanError, match="bucket extend-4x3 is outside"):
        prove_coverage([decode, extend, Bucket(EXTEND, 4, 3)], limits)
    with pytest.raises(PlanError, match="listed twice"):
        prove_coverage([decode, extend, extend], limits)
    with pytest.raises(PlanError, match=r"steps of 3 tokens are below 4 rows.*raise plan\.max_tokens"):
        prove_coverage([decode, extend], steps_of(4, 3))


@settings(max_examples=150)
@given(st.lists(LEGAL_BUCKET, min_size=1, max_size=8, unique=True))
def test_the_look_up_gives_the_smallest_that_covers(buckets):
    table = BucketTable(buckets)
    for phase in {b.phase for b in buckets}:
        for rows, tokens in itertools.product(range(1, 10), range(1, 13)):
            fits = [b for b in buckets if b.phase == phase and b.covers(rows, tokens)]
            if fits:
                assert table.covering(phase, rows, tokens) == min(fits, key=lambda b: (b.tokens, b.rows))
            else:
                with pytest.raises(
                    PlanError, match=rf"{rows} rows with {tokens} tokens exceed .*recompile with"
                ):
                    table.covering(phase, rows, tokens)


def expected_time(sizes: Sequence[int], distribution: dict[int, float], seconds) -> float:
    return sum(w * seconds(min(s for s in sizes if s >= size)) for size, w in distribution.items())


@settings(max_examples=200)
@given(
    most=st.integers(1, 12),
    count=st.integers(1, 5),
    weights=st.lists(st.floats(0, 10), min_size=12, max_size=12),
    fixed=st.floats(0.1, 100),
    steps=st.lists(st.floats(0, 10), min_size=12, max_size=12),
)
def test_the_choice_is_the_best_of_all(most, count, weights, fixed, steps):
    distribution = dict(zip(range(1, most + 1), weights, strict=False))
    assume(any(distribution.values()))

    def seconds(size: int) -> float:  # grows with the size, in any steps
        return fixed + sum(steps[:size])

    chosen = module._cut(distribution, most, count, seconds)
    assert chosen == sorted(set(chosen))
    assert chosen[-1] == most
    assert len(chosen) <= count
    choices = [
        (*some, most)
        for n in range(count)
        for some in itertools.combinations(range(1, most), min(n, most - 1))
    ]
    best = min(expected_time(sizes, distribution, seconds) for sizes in choices)
    assert expected_time(chosen, distribution, seconds) <= best * (1 + 1e-6)


@given(st.integers(1, 5000))
def test_candidates_are_dense_and_end_in_the_most(most):
    sizes = module._candidates(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert all(b - a <= max(1, a // 8) for a, b in itertools.pairwise(sizes))
    assert set(range(1, min(most, 16) + 1)) <= set(sizes)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    extra=st.integers(0, 300),
    paired=st.integers(0, 300),
    decode=st.integers(1, 9),
    extend=st.integers(1, 12),
)
def test_chosen_buckets_cover_every_batch(rows, extra, paired, decode, extend):
    steps = steps_of(rows, rows + extra, paired)
    shapes = {
        DECODE: Shapes(count=decode),
        EXTEND: Shapes(count=extend, row_counts=3),
        PAIRS: Shapes(count=decode),
    }

    def seconds(bucket: Bucket) -> float:
        return 1e-3 + 1e-5 * bucket.tokens + 1e-6 * bucket.rows

    chosen = {kind: choose_buckets(kind, step, shapes[kind], seconds) for kind, step in steps.items()}
    prove_coverage([b for found in chosen.values() for b in found], steps)
    for kind, found in chosen.items():
        assert found == tuple(sorted(found))
        assert len(found) <= shapes[kind].count
        assert Bucket(kind, steps[kind].rows, steps[kind].tokens) in found
    assert len({b.rows for b in chosen[EXTEND] if b.tokens >= rows}) <= 3
    one = choose_buckets(EXTEND, steps[EXTEND], Shapes(count=4, row_counts=1), seconds)
    assert {b.rows for b in one if b.tokens >= rows} == {rows}


def test_buckets_are_dense_where_traffic_is():
    step = steps_of(64, 64)[DECODE]

    def decode(rows: dict[int, float]) -> list[int]:
        chosen = choose_buckets(DECODE, step, Shapes(rows=rows, count=3), lambda b: 1e-4 * b.tokens)
        return [b.rows for b in chosen]

    assert decode({5: 1.0, 12: 1.0}) == [5, 12, 64]
    assert decode({40: 1.0}) == [40, 64]


@pytest.mark.parametrize("size", [0, -1, 65])
def test_traffic_beyond_the_limits_is_refused(size):
    with pytest.raises(PlanError, match=rf"a size of {size}; sizes go from 1 to 64"):
        choose_buckets(DECODE, steps_of(64, 64)[DECODE], Shapes(rows={size: 1.0}, count=2), lambda b: 1.0)
