"""What sequences share through the prefix cache, how prompts go in chunks, and what runs out."""

from __future__ import annotations

from typing import Any

import pytest
from fake_executable import VOCABULARY, FakeExecutable, alone, buckets_of

from makeready.engine.errors import RequestError
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import LENGTH, TokenSequence
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket, Limits

LIMITS = Limits(max_rows=4, max_tokens=32, context_len=64, page_size=4)
STEM = list(range(20))


def engine_of(
    limits: Limits = LIMITS, pages: int = 80, buckets: list[Bucket] | None = None, **options: Any
) -> Engine:
    executable = FakeExecutable(limits, buckets or buckets_of(limits), pages)
    return Engine(executable, SchedulerOptions(**options))


NEVER = frozenset([VOCABULARY])  # may end a sequence, for all that the scheduler knows


def sequence(
    prompt: list[int], count: int = 2, seed: int = 0, ends: frozenset[int] = frozenset(), **fields: Any
) -> TokenSequence:
    return TokenSequence(prompt, SamplingParams(max_new_tokens=count), seed, ends, **fields)


def run(engine: Engine, *sequences: TokenSequence) -> None:
    for each in sequences:
        engine.submit(each)
    while engine.busy:
        engine.step()
        engine.pool.check()
    for each in sequences:
        expected = alone(each.prompt, each.seed, each.sampling.max_new_tokens, frozenset())
        assert each.output == expected


def live(engine: Engine) -> list[tuple[str, int, int]]:
    executable = engine.executable
    assert isinstance(executable, FakeExecutable)
    return [(bucket.phase, rows, tokens) for bucket, rows, tokens in executable.steps]


def test_samples_of_a_prompt_compute_it_once_in_the_same_step() -> None:
    engine = engine_of()
    samples = [sequence([*STEM, 7], seed=seed) for seed in range(4)]
    run(engine, *samples)
    # 21 tokens, and the one behind the last full page for each of the others.
    assert live(engine) == [(EXTEND, 4, 24), (DECODE, 4, 4)]
    assert [sample.cached_tokens for sample in samples] == [0, 20, 20, 20]


def test_a_prompt_that_is_being_computed_in_chunks_is_not_computed_twice() -> None:
    limits = Limits(max_rows=4, max_tokens=8, context_len=64, page_size=4)
    engine = engine_of(limits)
    run(engine, *(sequence([*STEM, 30 + i]) for i in range(3)))
    chunks = sum(tokens for phase, _, tokens in live(engine) if phase == EXTEND)
    assert chunks <= 21 + 1 + 1 + 3  # 21 tokens once, one for each of the others, rows that generate


def test_the_last_token_is_run_though_all_is_cached() -> None:
    engine = engine_of()
    run(engine, sequence(STEM))
    run(engine, again := sequence(STEM, seed=1))
    assert again.cached_tokens == 16
    assert live(engine)[-2] == (EXTEND, 1, 4)


@pytest.mark.parametrize(("overlap", "cached"), [(False, 28), (True, 24)])
def test_a_conversation_goes_on_behind_its_answer(overlap: bool, cached: int) -> None:
    """Of 29 tokens the last was never run; with overlap, the one before it is not known in time."""
    engine = engine_of(overlap=overlap)
    run(engine, first := sequence(STEM, count=9))
    run(engine, second := sequence([*STEM, *first.output, 40, 41]))
    assert second.cached_tokens == cached


def test_one_token_behind_the_cache_is_a_decode_step() -> None:
    engine = engine_of()
    run(engine, sequence(STEM))
    run(engine, sequence([*STEM, 9]))
    assert live(engine)[-2:] == [(DECODE, 1, 1)] * 2


@pytest.mark.parametrize(("salts", "cached"), [(("a", "b"), 0), (("a", "a"), 20), (("", "a"), 0)])
def test_salts_share_nothing(salts: tuple[str, str], cached: int) -> None:
    engine = engine_of()
    run(engine, sequence([*STEM, 1], salt=salts[0]))
    run(engine, second := sequence([*STEM, 2], salt=salts[1]))
    assert second.cached_tokens == cached


def test_no_cache_shares_nothing() -> None:
    engine = engine_of(prefix_cache=False)
    run(engine, sequence([*STEM, 1]), sequence([*STEM, 1]))
    assert engine.pool.cached == 0
    assert live(engine)[0] == (EXTEND, 2, 32)


def test_pages_that_run_out_send_a_request_back_and_change_none_of_its_tokens() -> None:
    """Two sequences that fit at first and not to the end; where that is expected the second waits."""
    limits = Limits(max_rows=2, max_tokens=16, context_len=40, page_size=4)
    for ratio, ends, retractions in ((0.0, NEVER, 1), (1.0, NEVER, 0), (0.0, frozenset[int](), 0)):
        engine = engine_of(limits, pages=1 + 12, new_token_ratio=ratio, min_new_token_ratio=0.0)
        both = [sequence([50 + i, 1, 2, 3, 4], 30, seed=i, ends=ends) for i in range(2)]
        run(engine, *both)
        assert sum(each.retractions for each in both) == retractions
        assert all(each.finish_reason == LENGTH for each in both)
        if not retractions:  # at the end of the first, 9 pages, the second has 3 and so at most 12 tokens
            assert 0 < sum(rows == 2 for _, rows, _ in live(engine)) <= 8


def test_the_request_that_loses_least_is_sent_back() -> None:
    limits = Limits(max_rows=2, max_tokens=16, context_len=40, page_size=4)
    engine = engine_of(limits, pages=1 + 12, new_token_ratio=0.0, min_new_token_ratio=0.0)
    early, late = sequence([50, 1, 2, 3, 4], 30, ends=NEVER), sequence([51, 1, 2, 3, 4], 30, ends=NEVER)
    engine.submit(early)
    for _ in range(6):
        engine.step()
    run(engine, late)
    assert (early.retractions, late.retractions) == (0, 1)
    assert early.output == alone(early.prompt, 0, 30, frozenset())


def test_penalties_see_the_tokens_that_were_cached() -> None:
    """The fake executable compares the slot's history with the context where there is a penalty."""
    engine = engine_of()
    run(engine, sequence([*STEM, 1], 9))
    penalised = TokenSequence(
        [*STEM, 2], SamplingParams(max_new_tokens=9, presence_penalty=1.0), 0, frozenset()
    )
    run(engine, penalised)
    assert penalised.cached_tokens == 20


def test_chunks_are_no_larger_than_asked_for() -> None:
    engine = engine_of(chunked_prefill_size=6)
    run(engine, sequence(STEM), sequence([50, 51, 52, 53]))
    assert [tokens for _, _, tokens in live(engine)] == [6, 6, 6, 6, 2]
    assert live(engine)[3] == (EXTEND, 2, 6)


@pytest.mark.parametrize("interval", [0, 1, 3])
def test_steps_between_those_with_prompt_tokens(interval: int) -> None:
    engine = engine_of(decode_interval=interval, chunked_prefill_size=4, overlap=False)
    engine.submit(sequence([9, 9], 40))
    engine.step()
    engine.submit(sequence(STEM, 2))
    for _ in range(4 * (interval + 1)):
        engine.step()
    phases = [phase for phase, *_ in live(engine)[1:]]
    assert phases == ([DECODE] * interval + [EXTEND]) * 4


def test_a_chunk_is_cut_where_its_bucket_would_be_mostly_padding() -> None:
    buckets = [Bucket(DECODE, 4, 4), Bucket(EXTEND, 4, 8), Bucket(EXTEND, 4, 16), Bucket(EXTEND, 4, 32)]
    engine = engine_of(buckets=buckets)
    run(engine, sequence([*STEM[:17]], 1))
    assert [tokens for *_, tokens in live(engine)] == [16, 1]  # 16 + 8 are less than 32
    engine = engine_of(buckets=buckets)
    run(engine, sequence([*range(27)], 1))
    assert [tokens for *_, tokens in live(engine)] == [27]


def test_a_full_queue_refuses_and_says_why() -> None:
    engine = engine_of(max_queued_requests=2, max_running_requests=1)
    engine.submit(sequence(STEM))
    engine.step()
    for _ in range(2):
        engine.submit(sequence(STEM))
    assert engine.room == 0
    with pytest.raises(RequestError, match="2 requests wait already, as many as"):
        engine.submit(sequence(STEM))
    assert max(rows for _, rows, _ in live(engine)) == 1
    run(engine)


def test_thousands_wait_without_being_looked_at() -> None:
    """A step's cost does not grow with the queue: nobody waiting is converted or matched before its turn."""
    engine = engine_of(max_running_requests=1)
    sequences = [sequence(STEM) for _ in range(3000)]
    for each in sequences:
        engine.submit(each)
    for _ in range(4):
        engine.step()
    assert sum(each._ids is not None for each in sequences) < 10
    for each in sequences:
        engine.abort(each)
    assert not engine.busy
