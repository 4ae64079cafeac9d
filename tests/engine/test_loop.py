"""The engine against brute force: whatever runs beside it, a sequence gets the tokens it gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_executable import VOCABULARY, FakeExecutable, alone
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.engine.errors import RequestError
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ABORT, LENGTH, STOP, TokenSequence
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket, Limits


def make_engine(limits: Limits, pages: int, **options: Any) -> Engine:
    buckets = [
        Bucket(DECODE, limits.max_rows, limits.max_rows),
        Bucket(DECODE, 1, 1),
        Bucket(EXTEND, limits.max_rows, limits.max_tokens),
    ]
    return Engine(FakeExecutable(limits, sorted(set(buckets)), pages), SchedulerOptions(**options))


def make_sequence(
    prompt: list[int], count: int, seed: int, ends: frozenset[int] = frozenset()
) -> TokenSequence:
    return TokenSequence(prompt, SamplingParams(max_new_tokens=count), seed, ends)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Limits, int, list[tuple[list[int], int, int]], list[int]]:
    rows = draw(st.integers(1, 5))
    limits = Limits(rows, draw(st.integers(rows, 12)), 40, draw(st.sampled_from([1, 3, 4, 8])))
    pages = draw(st.integers(limits.pages_per_row + 1, limits.pages_per_row * 3))
    token = st.integers(0, VOCABULARY - 1)
    sequence = st.tuples(st.lists(token, min_size=1, max_size=25), st.integers(1, 15), st.integers(0, 5))
    return (
        limits,
        pages,
        draw(st.lists(sequence, min_size=1, max_size=12)),
        draw(st.lists(st.integers(0, 30), max_size=12)),
    )


@settings(max_examples=150, deadline=None)
@given(workloads(), st.frozensets(st.integers(0, VOCABULARY - 1), max_size=3))
def test_tokens_are_those_of_each_request_alone(workload, ends) -> None:
    """Requests arrive between steps, in any number, with pools that hold only a few of them."""
    limits, pages, specs, arrivals = workload
    engine = make_engine(limits, pages)
    sequences = [make_sequence(prompt, count, seed, ends) for prompt, count, seed in specs]
    late = sorted(zip(arrivals, sequences[1:], strict=False), key=lambda pair: pair[0])
    for sequence in [sequences[0], *sequences[1 + len(late) :]]:
        engine.submit(sequence)
    step = 0
    while engine.busy or late:
        while late and (late[0][0] <= step or not engine.busy):
            engine.submit(late.pop(0)[1])
        engine.step()
        engine.pool.check()
        step += 1
        assert step < 2000, "the engine makes no progress"
    for (prompt, count, seed), sequence in zip(specs, sequences, strict=True):
        expected = alone(prompt, seed, count, ends)
        assert sequence.output == expected
        assert sequence.finish_reason == (STOP if expected[-1] in ends else LENGTH)
    assert engine.pool.held == 0


@settings(max_examples=50, deadline=None)
@given(workloads(), st.data())
def test_aborts_at_any_moment_leave_the_others_alone(workload, data) -> None:
    limits, pages, specs, _ = workload
    engine = make_engine(limits, pages)
    sequences = [make_sequence(*spec) for spec in specs]
    for sequence in sequences:
        engine.submit(sequence)
    while engine.busy:
        if data.draw(st.booleans()):
            engine.abort(data.draw(st.sampled_from(sequences)))
        engine.step()
        engine.pool.check()
    for (prompt, count, seed), sequence in zip(specs, sequences, strict=True):
        expected = alone(prompt, seed, count, frozenset())
        assert sequence.output == expected[: len(sequence.output)]
        assert sequence.finish_reason == ABORT or sequence.output == expected
    assert engine.pool.held == 0


def test_long_prompts_run_in_chunks_beside_decoding_rows() -> None:
    limits = Limits(max_rows=3, max_tokens=8, context_len=64, page_size=4)
    engine = make_engine(limits, pages=40, overlap=False)
    short = make_sequence([1, 2], 12, 0)
    engine.submit(short)
    engine.step()
    long = make_sequence(list(range(30)), 3, 1)
    engine.submit(long)
    before = len(short.output)
    while not long.output:
        engine.step()
    # 30 tokens at 7 a step (one of the 8 is the decoding row's) take 5 steps; the short row moved in each.
    assert len(short.output) - before == 5
    executable = engine.executable
    assert isinstance(executable, FakeExecutable)
    assert [tokens for bucket, _, tokens in executable.steps[1:6]] == [8, 8, 8, 8, 3]


def test_requests_that_could_never_run_are_refused_at_once() -> None:
    limits = Limits(max_rows=2, max_tokens=8, context_len=32, page_size=4)
    engine = make_engine(limits, pages=5)
    with pytest.raises(RequestError, match="exceed the context of 32 tokens"):
        engine.submit(make_sequence([1] * 30, 3, 0))
    with pytest.raises(RequestError, match="may need 5 KV pages, there are 4"):
        engine.submit(make_sequence([1] * 10, 8, 0))
    assert not engine.busy


def test_padding_rows_and_tokens_hold_their_defaults() -> None:
    """A batch smaller than its bucket: what is not live belongs to the null slot and the null page."""
    limits = Limits(max_rows=4, max_tokens=16, context_len=32, page_size=4)
    engine = make_engine(limits, pages=20)
    seen: list[dict[str, np.ndarray]] = []
    launch = engine.executable.launch

    def record(bucket: Bucket, step, **cut):
        seen.append(dict(step))
        return launch(bucket, step, **cut)

    engine.executable.launch = record  # type: ignore[method-assign]
    engine.submit(make_sequence([5, 6, 7], 2, 0))
    engine.step()
    (step,) = seen
    assert step["token_ids"].tolist() == [5, 6, 7] + [0] * 13
    assert step["query_len"].tolist() == [3, 0, 0, 0]
    assert step["row_slot"].tolist() == step["sample_slot"].tolist() == [0, 4, 4, 4]
    assert step["row_start"].tolist() == [0, -1, -1, -1]
    assert step["grow_page"].tolist() == [[0]] * 4
