"""The one path into the engine, on an executable that computes nothing."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest
from fake_executable import FakeExecutable, alone, buckets_of

from makeready.engine.errors import RequestError
from makeready.engine.feed import AHEAD, MADE, Feed, Final, Handed, Refused
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ABORT, TokenSequence
from makeready.graphs.plan.spec import Limits

LIMITS = Limits(max_rows=3, max_tokens=16, context_len=32, page_size=4)


def engine_of(**options: Any) -> Engine:
    return Engine(FakeExecutable(LIMITS, buckets_of(LIMITS), pages=40), SchedulerOptions(**options))


def replies(prompt: list[int], count: int = 4, samples: int = 1) -> list[Reply]:
    params = SamplingParams(max_new_tokens=count)
    return [Reply(TokenSequence(prompt, params, seed, frozenset())) for seed in range(samples)]


def drained(feed: Feed[Any]) -> list[Handed[Any]]:
    handed: list[Handed[Any]] = []
    while feed.busy:
        handed += feed.step()
    return handed


def test_samples_of_each_prompt_come_back_under_its_key() -> None:
    with closing(Feed[str](engine_of())) as feed:
        feed.put("a", lambda: replies([1, 2, 3], 5, samples=3), samples=3)
        feed.put("b", lambda: replies([4], 2))
        handed = drained(feed)
    made = {(each.key, each.sample): each.reply.sequence.output for each in handed if isinstance(each, Final)}
    assert made == {
        **{("a", seed): alone([1, 2, 3], seed, 5, frozenset()) for seed in range(3)},
        ("b", 0): alone([4], 0, 2, frozenset()),
    }


@pytest.mark.parametrize("bad", ["made", "queued"])
def test_a_refused_prompt_costs_no_other(bad: str) -> None:
    """Also where the engine refuses a later sample than the first."""
    engine = engine_of()
    wrong = replies([1] * 30, 9) if bad == "queued" else None
    with closing(Feed[int](engine)) as feed:
        feed.put(0, lambda: [*replies([1], 9), *(wrong or [1 / 0])], samples=2)  # type: ignore[list-item]
        feed.put(1, lambda: replies([2], 3))
        refused, final = sorted(drained(feed), key=lambda each: each.key)
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, RequestError if wrong else ZeroDivisionError)
    assert isinstance(final, Final)
    assert final.reply.sequence.output == alone([2], 0, 3, frozenset())
    assert engine.pool.held == 0


def test_no_more_is_asked_for_than_the_engine_has_room_for() -> None:
    """Enough for every row at once, then a few a step, and never beyond what may wait."""
    with closing(Feed[int](engine_of())) as feed:
        assert feed.room == max(LIMITS.max_rows, MADE)
        most = 0
        for turn in range(99):
            for _ in range(feed.room):
                feed.put(turn, lambda: replies([1], 30))
            most = max(most, len(feed._running))
            feed.step()
        assert most == LIMITS.max_rows + AHEAD == feed.depth
    with closing(Feed[int](engine_of(max_queued_requests=5))) as feed:
        assert feed.room == 5


def test_a_queue_that_is_full_is_waited_for_or_refuses() -> None:
    for patient in (True, False):
        engine = engine_of(max_queued_requests=2)
        with closing(Feed[int](engine, patient=patient)) as feed:
            feed.put(0, lambda: replies([1], 4, samples=2), samples=2)
            feed.put(1, lambda: replies([2], 4, samples=3), samples=3)
            handed = drained(feed)
        served = [each for each in handed if isinstance(each, Final)]
        assert len(served) == (5 if patient else 2)
        assert [each.key for each in handed if isinstance(each, Refused)] == ([] if patient else [1])
        assert engine.pool.held == 0


def test_a_long_prompt_is_made_while_others_run() -> None:
    ready = threading.Event()

    def slow() -> list[Reply]:
        assert ready.wait(600), "the other prompt was not answered meanwhile"
        return replies([5], 2)

    with closing(Feed[str](engine_of())) as feed:
        feed.put("long", slow, long=True)
        feed.put("short", lambda: replies([6], 2))
        keys = []
        while feed.busy:
            keys += [each.key for each in feed.step()]
            if keys:
                ready.set()
    assert keys == ["short", "long"]


def test_what_is_dropped_ends_and_is_not_handed_back() -> None:
    engine = engine_of()
    with closing(Feed[int](engine)) as feed:
        gone = feed.put(0, lambda: replies([1, 2], 20, samples=4), samples=4)
        feed.put(1, lambda: replies([3], 6))
        handed = feed.step()
        feed.drop(gone)
        handed += drained(feed)
    assert [each.key for each in handed] == [1]
    assert [reply.finish_reason for reply in gone.replies] == [ABORT] * 4
    assert engine.pool.held == 0


def test_what_is_dropped_while_it_is_made_is_forgotten() -> None:
    ready = threading.Event()

    def slow() -> list[Reply]:
        assert ready.wait(600)
        raise ZeroDivisionError

    with closing(Feed[int](engine_of())) as feed:
        feed.drop(feed.put(0, slow, long=True))
        ready.set()
        assert drained(feed) == []


def test_a_feed_within_a_feed_takes_nothing_from_it() -> None:
    """Somebody else steps the engine, and ends it: replies still reach the feed that asked for them."""
    engine = engine_of()
    with closing(Feed[str](engine)) as outer:
        outer.put("outer", lambda: replies([1], 3))
        outer.step()
        with closing(Feed[str](engine)) as inner:
            inner.put("inner", lambda: replies([2], 9))
            assert [each.key for each in drained(inner)] == ["inner"]
        assert not engine.busy
        assert [each.key for each in drained(outer)] == ["outer"]
        outer.put("closed", lambda: replies([1], 9))
        outer.step()
        engine.close()
        (handed,) = drained(outer)
        assert isinstance(handed, Final)
        assert handed.reply.finish_reason == ABORT
