"""Every page is exactly one of free, cached, held, whatever is done with it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makeready.engine.errors import RequestError
from makeready.engine.kv.pool import PagePool


@given(st.integers(2, 30), st.lists(st.tuples(st.sampled_from("tsphrd"), st.integers(0, 8)), max_size=40))
def test_pages_move_between_the_states(pages: int, events: list[tuple[str, int]]) -> None:
    pool = PagePool(pages)
    free, owned, shared, cached = set(range(1, pages)), set[int](), set[int](), set[int]()
    moves = {
        "s": (pool.share, owned, shared),
        "p": (pool.park, shared, cached),
        "h": (pool.hold, cached, shared),
        "r": (pool.release, owned, free),
        "d": (pool.drop, cached, free),
    }
    for event, count in events:
        if event == "t":
            taken = pool.take(min(count, pool.free))
            assert len(set(taken)) == len(taken)
            assert set(taken) <= free
            free -= set(taken)
            owned |= set(taken)
        else:
            move, source, target = moves[event]
            some = sorted(source)[:count]
            move(some)
            source -= set(some)
            target |= set(some)
        pool.check()
        assert (pool.free, pool.cached, pool.held) == (len(free), len(cached), len(owned | shared))
        assert pool.usable == pages - 1


def test_what_was_freed_last_is_taken_first() -> None:
    pool = PagePool(6)
    assert pool.take(3) == [1, 2, 3]
    pool.release([2, 1])
    assert pool.take(2) == [1, 2]


@pytest.mark.parametrize("pages", [[1], [1, 2]])
def test_pages_that_are_not_owned_cannot_be_released(pages: list[int]) -> None:
    pool = PagePool(6)
    with pytest.raises(AssertionError):
        pool.release(pages)
    owned = pool.take(len(pages))
    pool.share(owned)
    with pytest.raises(AssertionError):
        pool.release(owned)


def test_a_pool_of_the_null_page_alone_is_refused() -> None:
    with pytest.raises(RequestError, match=r"give kv\.pages at least 2"):
        PagePool(1)
