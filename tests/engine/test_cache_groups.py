"""What sequences share where a model's cache has windows and states, and how much of it rows hold."""

from __future__ import annotations

from typing import Any

import pytest
from fake_executable import FakeExecutable, alone

from makeready.engine.errors import RequestError
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket, CacheGroup, CacheSpec, Limits

LIMITS = Limits(max_rows=4, max_tokens=32, context_len=64, page_size=4)
BUCKETS = [Bucket(DECODE, 4, 4), Bucket(EXTEND, 4, 32)]  # no chunk is cut for a smaller one
STEM = list(range(20))
FULL, NEAR, STATE = (
    CacheGroup("kv", (), 4),
    CacheGroup("near", (), 4, window=6),
    CacheGroup("state", (), None),
)


def engine_of(*groups: CacheGroup, limits: Limits = LIMITS, blocks: dict[str, int], **options: Any) -> Engine:
    first = blocks[groups[0].name]
    cache = CacheSpec(limits.page_size, groups)
    executable = FakeExecutable(limits, BUCKETS, first, cache=cache, blocks=blocks)
    return Engine(executable, SchedulerOptions(**options))


def sequence(prompt: list[int], count: int = 2, **fields: Any) -> TokenSequence:
    return TokenSequence(prompt, SamplingParams(max_new_tokens=count), 0, frozenset(), **fields)


def run(engine: Engine, *sequences: TokenSequence) -> None:
    for each in sequences:
        engine.submit(each)
    most = dict.fromkeys(engine.pools.by_name, 0)
    while engine.busy:
        engine.step()
        engine.pools.check()
        assert engine.scheduler.cache is None or engine.scheduler.cache.check() is None
        for name, pool in engine.pools.by_name.items():
            most[name] = max(most[name], pool.held)
            held = engine.executable
            assert isinstance(held, FakeExecutable)
            {**held.paged, **held.states}[name].scribble(pool._free)
    for each in sequences:
        assert each.output == alone(each.prompt, each.seed, each.sampling.max_new_tokens, frozenset())
    engine.most = most  # type: ignore[attr-defined]


def test_a_window_holds_few_pages_however_long_the_request_is() -> None:
    engine = engine_of(NEAR, blocks={"near": 9}, prefix_cache=False)
    run(engine, sequence([7, 8, 9], 60))
    # Two pages before the one that is being filled, as a window of 6 may reach into both.
    assert engine.most == {"near": 3}  # type: ignore[attr-defined]


def test_a_prompt_longer_than_all_window_pages_goes_in_chunks() -> None:
    engine = engine_of(FULL, NEAR, blocks={"kv": 40, "near": 5})
    run(engine, sequence([*range(50)], 9))
    assert isinstance(engine.executable, FakeExecutable)
    chunks = [tokens for bucket, _, tokens in engine.executable.steps if bucket.phase == EXTEND]
    assert chunks[0] == 16  # four pages
    assert sum(chunks) == 50


def test_rows_wait_where_windows_or_states_are_few() -> None:
    for groups, blocks in (((FULL, NEAR), {"kv": 99, "near": 7}), ((FULL, STATE), {"kv": 99, "state": 5})):
        engine = engine_of(*groups, blocks=blocks)
        run(engine, *(sequence([30 + i, 1, 2, 3], 20) for i in range(4)))
        assert isinstance(engine.executable, FakeExecutable)
        assert max(rows for _, rows, _ in engine.executable.steps) == 2


def test_a_prefix_with_a_window_is_found_again() -> None:
    engine = engine_of(FULL, NEAR, blocks={"kv": 40, "near": 40})
    run(engine, sequence([*STEM, 1], 9))
    run(engine, again := sequence([*STEM, 2]))
    assert again.cached_tokens == 20


def test_what_a_window_lost_is_computed_once_more_and_then_found() -> None:
    engine = engine_of(FULL, NEAR, blocks={"kv": 99, "near": 6})
    run(engine, sequence([*STEM, 1]))
    run(engine, sequence([40 + i for i in range(9)], 30))  # takes all pages of the window
    run(engine, again := sequence([*STEM, 2]))
    assert again.cached_tokens == 0
    run(engine, third := sequence([*STEM, 3]))
    assert third.cached_tokens == 20


def test_a_prompt_leaves_a_state_at_its_last_page_border() -> None:
    engine = engine_of(FULL, STATE, blocks={"kv": 99, "state": 9})
    run(engine, sequence([*STEM, 1, 2]))
    assert isinstance(engine.executable, FakeExecutable)
    assert [tokens for *_, tokens in engine.executable.steps][:2] == [20, 2]
    run(engine, again := sequence([*STEM, 3]))
    assert again.cached_tokens == 20


def test_where_prompts_part_the_second_leaves_a_state() -> None:
    """The first had no reason to stop there; the third goes on from what the second left while it runs."""
    engine = engine_of(FULL, STATE, blocks={"kv": 99, "state": 9})
    run(engine, sequence([*STEM, *range(30, 39)]))
    second, third = sequence([*STEM, *range(40, 49)], 30), sequence([*STEM, *range(20, 29)])
    engine.submit(second)
    engine.step()
    engine.step()
    assert second.cached_tokens == 0
    run(engine, third)
    assert third.cached_tokens == 20
    assert second.output == alone(second.prompt, 0, 30, frozenset())


def test_a_conversation_goes_on_behind_an_answer_that_ends_a_page() -> None:
    engine = engine_of(STATE, blocks={"state": 9}, overlap=False)
    run(engine, first := sequence(STEM, count=9))  # 28 tokens are run
    run(engine, second := sequence([*STEM, *first.output, 40, 41]))
    assert second.cached_tokens == 28


def test_groups_that_are_too_small_for_one_row_are_refused() -> None:
    for groups, blocks in (((NEAR,), {"near": 3}), ((STATE,), {"state": 2})):
        with pytest.raises(RequestError, match="too few blocks for one row"):
            engine_of(*groups, blocks=blocks)
        assert CacheSpec(4, groups).blocks(99, LIMITS)[groups[0].name] > 3


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ((), "needs groups of different names"),
        ((FULL, FULL), "needs groups of different names"),
        ((FULL, CacheGroup("other", (), 8)), "pages of 8 tokens and the plan of 4"),
        ((CacheGroup("state", (), None, window=4),), "is a state, which has no window"),
    ],
)
def test_groups_that_do_not_go_together_are_refused(groups: tuple[CacheGroup, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CacheSpec(4, groups)


def test_plans_give_windows_and_states_what_all_rows_need() -> None:
    """By hand: a row of window 6 in pages of 4 holds 2 pages and takes 2 more; states go in twos.

    Four rows of 64 tokens take 64 pages; those behind make two snapshots, each with a state and a tail of 2 pages.
    """
    blocks = CacheSpec(4, (FULL, NEAR, STATE)).blocks(100, LIMITS)
    assert blocks == {"kv": 100, "near": 1 + 8 + 4 * 4 + 2 * 2, "state": 1 + 2 * 4 + 2}
