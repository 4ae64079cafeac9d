"""The prefix cache against brute force: a dictionary of every page-aligned prefix that is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.engine.errors import RequestError
from makeready.engine.kv.eviction import POLICIES
from makeready.engine.kv.pool import PagePool
from makeready.engine.kv.radix import Prefix, PrefixCache

Key = tuple[str, tuple[int, ...]]


@dataclass
class Model:
    """Every cached prefix → its last page, and how often each is held."""

    size: int
    page: dict[Key, int] = field(default_factory=dict)
    holds: Counter[Key] = field(default_factory=Counter)

    def keys(self, tokens: Sequence[int], salt: str) -> list[Key]:
        """Whole-page prefixes of a sequence, shortest first."""
        return [(salt, tuple(tokens[:n])) for n in range(self.size, len(tokens) + 1, self.size)]

    def cached(self, tokens: Sequence[int], salt: str) -> list[Key]:
        keys = self.keys(tokens, salt)
        missing = next((i for i, key in enumerate(keys) if key not in self.page), len(keys))
        return keys[:missing]

    @property
    def idle(self) -> int:
        return sum(1 for key in self.page if not self.holds[key])


@dataclass
class Held:
    tokens: list[int]
    salt: str
    prefix: Prefix
    pages: list[int]  # of the whole sequence, its own last ones included


class Driver:
    """Does to the cache and to the model what requests do, and compares after every event."""

    def __init__(self, size: int, pages: int, policy: str) -> None:
        self.pool = PagePool(pages)
        self.cache = PrefixCache(self.pool, size, policy)
        self.model = Model(size)
        self.held: list[Held] = []

    def check(self) -> None:
        self.pool.check()
        self.cache.check()
        assert self.pool.free + self.pool.cached + self.pool.held == self.pool.usable
        assert self.cache.evictable == self.model.idle
        shared = {key for held in self.held for key in self.prefix_keys(held)}
        own = sum(len(held.pages) - len(held.prefix.pages) for held in self.held)
        assert self.pool.held == len(shared) + own
        for held in self.held:
            keys = self.prefix_keys(held)
            assert held.prefix.pages == [self.model.page[key] for key in keys]
            assert held.prefix.tokens == len(keys) * self.model.size

    def prefix_keys(self, held: Held) -> list[Key]:
        return self.model.keys(held.tokens[: held.prefix.tokens], held.salt)

    def acquire(self, tokens: list[int], salt: str, priority: int) -> None:
        expected = self.model.cached(tokens, salt)
        assert self.cache.match(tokens, salt) == len(expected) * self.model.size
        prefix = self.cache.acquire(np.array(tokens, np.int32), salt, priority)
        assert prefix.pages == [self.model.page[key] for key in expected]
        self.model.holds.update(expected)
        self.held.append(Held(tokens[: prefix.tokens], salt, prefix, list(prefix.pages)))

    def insert(self, held: Held, more: list[int]) -> None:
        """The sequence grows by computed tokens, and its full pages go into the tree."""
        tokens = held.tokens + more
        missing = -(-len(tokens) // self.model.size) - len(held.pages)
        if missing > self.pool.free:
            self.evict(missing - self.pool.free)
        if missing > self.pool.free:
            return
        held.tokens, held.pages = tokens, held.pages + self.pool.take(missing)
        before = len(held.prefix.pages)
        held.prefix = self.cache.insert(held.prefix, tokens, [held.pages])
        for i, key in enumerate(self.model.keys(tokens, held.salt)):
            if key not in self.model.page:
                self.model.page[key] = held.pages[i]
            held.pages[i] = self.model.page[key]
            if i >= before:
                self.model.holds[key] += 1

    def release(self, held: Held) -> None:
        self.held.remove(held)
        self.pool.release(held.pages[len(held.prefix.pages) :])
        self.model.holds.subtract(self.prefix_keys(held))
        self.cache.release(held.prefix)

    def evict(self, count: int) -> None:
        expected = max(0, min(count, self.model.idle))
        assert self.cache.evict(count) == expected
        gone = [key for key in self.model.page if self.cache.match(key[1], key[0]) < len(key[1])]
        assert len(gone) == expected
        assert not any(self.model.holds[key] for key in gone)
        for key in gone:
            del self.model.page[key]


def events(data: st.DataObject, count: int) -> None:
    """Sequences over two token ids and few lengths, so that nearly all of them part somewhere."""
    size = data.draw(st.sampled_from([1, 2, 3, 16]))
    driver = Driver(size, data.draw(st.integers(2, 40)), data.draw(st.sampled_from(list(POLICIES))))
    pages = st.lists(st.integers(0, 1), max_size=6)
    for _ in range(count):
        event = data.draw(st.sampled_from(["acquire", "insert", "insert", "release", "evict", "reset"]))
        held = data.draw(st.sampled_from(driver.held)) if driver.held else None
        # Whole pages of one token each part at page borders; a few single tokens part inside pages.
        tokens = [t for token in data.draw(pages) for t in [token] * size]
        tokens += data.draw(st.lists(st.integers(0, 1), max_size=size + 1))
        if event == "acquire":
            driver.acquire(tokens, data.draw(st.sampled_from(["", "b"])), data.draw(st.integers(0, 2)))
        elif event == "insert" and held:
            driver.insert(held, tokens)
        elif event == "release" and held:
            driver.release(held)
        elif event == "evict":
            driver.evict(data.draw(st.integers(-1, 9)))
        elif event == "reset":
            driver.evict(driver.model.idle)
        driver.check()
    for held in list(driver.held):
        driver.release(held)
        driver.check()
    driver.cache.reset()
    assert driver.pool.free == driver.pool.usable


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cache_is_the_dictionary_of_its_prefixes(data: st.DataObject) -> None:
    events(data, 30)


@pytest.mark.soak
@settings(max_examples=5000, deadline=None)
@given(st.data())
def test_cache_is_the_dictionary_of_its_prefixes_for_long(data: st.DataObject) -> None:
    events(data, 60)


def put(cache: PrefixCache, tokens: list[int], priority: int = 0) -> None:
    prefix = cache.acquire(tokens, priority=priority)
    missing = len(tokens) // cache.page_size - len(prefix.pages)
    cache.release(cache.insert(prefix, tokens, [prefix.pages + cache.pool.take(missing)]))


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("lru", "bca"),  # a is used again last
        ("fifo", "abc"),
        ("lfu", "cba"),  # hits: a 3, b 2, c 1
        ("priority", "acb"),  # priorities: a 0, b 2, c 1
    ],
)
def test_policies_choose_what_goes_first(policy: str, order: str) -> None:
    cache = PrefixCache(PagePool(20), 2, policy)
    sequence = {"a": [1, 1, 2, 2], "b": [3, 3, 4, 4], "c": [5, 5, 6, 6]}
    for name, priority in (("a", 0), ("b", 2), ("b", 0), ("c", 1), ("a", 0), ("a", 0)):
        put(cache, sequence[name], priority)
    gone = []
    for _ in sequence:
        assert cache.evict(2) == 2
        gone += [name for name in sequence if not cache.match(sequence[name]) and name not in gone]
    assert "".join(gone) == order


def test_what_was_in_use_until_now_counts_as_used_now() -> None:
    cache = PrefixCache(PagePool(20), 1)
    put(cache, [1])
    put(cache, [2])
    long = cache.acquire([1])
    cache.release(cache.acquire([2]))
    cache.release(long)
    assert cache.evict(1) == 1
    assert (cache.match([1]), cache.match([2])) == (1, 0)


def test_ends_go_before_beginnings() -> None:
    """A conversation loses its last pages first, and what two share last of all."""
    cache = PrefixCache(PagePool(20), 1)
    put(cache, [1, 2, 3, 4])
    put(cache, [1, 2, 5, 6])
    assert cache.evict(1) == 1
    assert (cache.match([1, 2, 3, 4]), cache.match([1, 2, 5, 6])) == (3, 4)
    assert cache.evict(3) == 3
    assert cache.match([1, 2, 9]) == 2


def test_two_that_compute_the_same_prompt_share_it_in_the_end() -> None:
    pool = PagePool(20)
    cache = PrefixCache(pool, 2)
    tokens = [1, 2, 3, 4, 5]
    first, second = cache.acquire(tokens), cache.acquire(tokens)
    own, other = pool.take(3), pool.take(3)
    first = cache.insert(first, tokens, [own])
    second = cache.insert(second, tokens, [other])
    assert first.pages == second.pages == own[:2]
    assert pool.held == 2 + 2  # two pages shared, and each one's third page, which is not full
    cache.release(first)
    assert pool.cached == 0
    cache.release(second)
    assert pool.cached == 2


def test_salts_share_nothing() -> None:
    cache = PrefixCache(PagePool(20), 1)
    put(cache, [1, 2, 3])
    assert cache.match([1, 2, 3]) == 3
    assert cache.match([1, 2, 3], "tenant") == 0
    prefix = cache.acquire([1, 2, 3], "tenant")
    assert prefix.tokens == 0
    cache.release(prefix)


def test_a_used_up_prefix_is_refused() -> None:
    cache = PrefixCache(PagePool(20), 1)
    prefix = cache.acquire([1])
    cache.release(prefix)
    with pytest.raises(AssertionError, match="released or replaced"):
        cache.release(prefix)


@pytest.mark.slow
def test_long_prompts_and_many_nodes() -> None:
    """10^5 nodes and prompts of 10^5 tokens; quadratic work anywhere would take minutes."""
    cache = PrefixCache(PagePool(400_000), 1)
    shared = list(range(100_000))
    put(cache, shared)
    for i in range(50_000):
        put(cache, [*shared[i : i + 1], -1 - i])  # a root edge each
        put(cache, [0, i, -7])
    cache.check()
    assert cache.match(shared) == 100_000
    assert cache.evict(50_000) == 50_000
    cache.check()


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(RequestError, match="no eviction policy 'mru'; use one of lru, lfu, fifo, priority"):
        PrefixCache(PagePool(3), 1, "mru")


def test_what_is_forgotten_is_found_by_nobody_and_kept_by_its_holders():
    pool = PagePool(9)
    cache = PrefixCache(pool, 2)
    tokens = [1, 2, 3, 4]

    def put(salt: str) -> Prefix:
        return cache.insert(cache.acquire(tokens, salt), tokens, [pool.take(2)])

    held, other = put(""), put("other")
    cache.forget()
    cache.check()
    assert (cache.match(tokens), cache.match(tokens, "other")) == (0, 4)
    again = put("")
    assert set(again.pages).isdisjoint(held.pages)
    assert cache.match(tokens) == 4
    cache.forget()
    cache.forget("nothing is there")
    for prefix in (held, again, other):
        cache.release(prefix)
    cache.check()
    assert pool.cached == 6
    cache.reset()
    cache.check()
    assert (pool.cached, pool.held) == (0, 0)
