"""The prefix cache with windows and states against brute force: a dictionary of all that it knows of a prefix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.engine.kv.counted import Counted
from makeready.engine.kv.eviction import POLICIES
from makeready.engine.kv.pools import Pools
from makeready.engine.kv.radix import Prefix, PrefixCache
from makeready.graphs.plan.spec import CacheGroup, CacheSpec

Key = tuple[str, tuple[int, ...]]


@dataclass
class Known:
    """What the tree has of the last page of a prefix, by group, and the states behind it; 0 for none."""

    full: list[int]
    windows: list[int]
    states: list[int]


@dataclass
class Row:
    """A sequence that runs: ``pages`` by group as the engine keeps them, ``states`` that it holds."""

    tokens: list[int]
    salt: str
    prefix: Prefix
    full: list[list[int]]
    windows: list[list[int]]
    states: list[tuple[Counted, int]] = field(default_factory=list)


class Driver:
    """Does to the cache and to the dictionary what requests do, and compares after every event."""

    def __init__(self, size: int, cache: CacheSpec, blocks: int, policy: str) -> None:
        self.size = size
        self.pools = Pools(cache, {group.name: blocks for group in cache.groups}, policy)
        self.cache = PrefixCache(self.pools, size, policy)
        self.known: dict[Key, Known] = {}
        self.rows: list[Row] = []

    def keys(self, tokens: list[int], salt: str) -> list[Key]:
        return [(salt, tuple(tokens[:n])) for n in range(self.size, len(tokens) + 1, self.size)]

    def valid(self, tokens: list[int], salt: str) -> int:
        """Pages of the longest prefix that every group can go on behind."""
        keys = self.keys(tokens, salt)
        known = [
            self.known[key]
            for key in keys[: next((i for i, k in enumerate(keys) if k not in self.known), 99)]
        ]
        for end in range(len(known), 0, -1):
            tails = [known[max(0, end - counted.tail) : end] for counted in self.pools.windows]
            whole = all(page.windows[g] for g, tail in enumerate(tails) for page in tail)
            if whole and all(known[end - 1].states):
                return end
        return 0

    def held(self, counted: Counted) -> Counter[int]:
        """Blocks of a window or state that rows hold, how often."""
        if counted in self.pools.states:
            return Counter(block for row in self.rows for own, block in row.states if own is counted)
        g = self.pools.windows.index(counted)
        return Counter(block for row in self.rows for block in row.windows[g] if block)

    def check(self) -> None:
        self.pools.check()
        self.cache.check()
        path = {key for row in self.rows for key in self.keys(row.tokens[: row.prefix.tokens], row.salt)}
        idle = sum(key not in path for key in self.known)
        for g, pool in enumerate(self.pools.full):
            own = sum(len(row.full[g]) - row.prefix.tokens // self.size for row in self.rows)
            assert (pool.cached, pool.held) == (idle, len(path) + own)
            for row in self.rows:
                keys = self.keys(row.tokens[: row.prefix.tokens], row.salt)
                assert row.prefix.blocks[g] == [self.known[key].full[g] for key in keys]
        for counted in self.pools.counted:
            held = self.held(counted)
            tree = [block for page in self.known.values() for block in self.blocks_of(counted, page) if block]
            assert len(set(tree)) == len(tree)
            assert counted.pool.cached == sum(block not in held for block in tree)
            assert counted.pool.held == len(held)

    def blocks_of(self, counted: Counted, page: Known) -> list[int]:
        """The block that a page has in a group, as a slice."""
        if counted in self.pools.states:
            at = self.pools.states.index(counted)
            return page.states[at : at + 1]
        at = self.pools.windows.index(counted)
        return page.windows[at : at + 1]

    def acquire(self, tokens: list[int], salt: str) -> None:
        end = self.valid(tokens, salt)
        assert self.cache.match(tokens, salt) == end * self.size
        prefix = self.cache.acquire(tokens, salt)
        assert prefix.tokens == end * self.size
        found = [self.known[key] for key in self.keys(tokens, salt)[:end]]
        windows = []
        for g, counted in enumerate(self.pools.windows):
            first = max(0, end - counted.tail)
            assert prefix.tails[g] == [page.windows[g] for page in found[first:]]
            windows.append([0] * first + list(prefix.tails[g]))
        states = found[-1].states if found else [0 for _ in self.pools.states]
        assert prefix.states == states
        held = [(c, b) for c, b in zip(self.pools.states, prefix.states, strict=True) if b]
        full = [list(pages) for pages in prefix.blocks]
        self.rows.append(Row(tokens[: prefix.tokens], salt, prefix, full, windows, held))

    def slide(self, row: Row, count: int) -> None:
        """The row reads its first pages no more."""
        for counted, pages in zip(self.pools.windows, row.windows, strict=True):
            for at, block in enumerate(pages[:count]):
                if block:
                    counted.free(block)
                pages[at] = 0

    def insert(self, row: Row, more: list[int], leave: bool) -> None:
        """The sequence grows by computed tokens, and its full pages go into the tree, maybe with a state."""
        tokens, pools = row.tokens + more, self.pools
        new = -(-len(tokens) // self.size) - len(
            (row.full + row.windows + [[0] * (len(row.tokens) // self.size)])[0]
        )
        for pool in pools.full:
            if new > pool.free:
                self.evict(new - pool.free)
        for counted, count in [*((c, new) for c in pools.windows), *((c, 1) for c in pools.states)]:
            self.give_up(counted, min(max(0, count - counted.pool.free), counted.pool.cached))
        if any(pool.free < new for pool in pools.full) or any(c.pool.free < new for c in pools.windows):
            return
        leave = leave and len(tokens) % self.size == 0 and all(c.pool.free for c in pools.states)
        row.tokens = tokens
        for pool, pages in zip(pools.full, row.full, strict=True):
            pages += pool.take(new)
        for counted, pages in zip(pools.windows, row.windows, strict=True):
            pages += counted.pool.take(new)
        states = [counted.pool.take(1)[0] if leave else 0 for counted in pools.states]
        before = row.prefix.tokens // self.size
        row.prefix = self.cache.insert(row.prefix, tokens, [*row.full, *row.windows], states)
        self._learn(row, before)
        self._left(row, self.keys(tokens, row.salt), states)

    def _learn(self, row: Row, before: int) -> None:
        for i, key in enumerate(self.keys(row.tokens, row.salt)):
            own = [pages[i] for pages in row.windows]
            page = self.known.get(key)
            if page is None:
                page = Known([pages[i] for pages in row.full], own, [0 for _ in self.pools.states])
                self.known[key] = page
            elif i >= before:
                page.windows = [old or new for old, new in zip(page.windows, own, strict=True)]
            for g, pages in enumerate(row.full):
                pages[i] = page.full[g]

    def _left(self, row: Row, keys: list[Key], states: list[int]) -> None:
        for g, (counted, block) in enumerate(zip(self.pools.states, states, strict=True)):
            if not block:
                continue
            if keys and keys[-1] in self.known and not self.known[keys[-1]].states[g]:
                self.known[keys[-1]].states[g] = block
                row.states.append((counted, block))
            else:
                assert block not in counted.nodes
                counted.free(block)

    def keep(self, row: Row, more: list[int]) -> None:
        """A row leaves a state behind tokens that the tree may know from others."""
        tokens = (row.tokens[: row.prefix.tokens] + more)[
            : (row.prefix.tokens + len(more)) // self.size * self.size
        ]
        for counted in self.pools.states:
            self.give_up(counted, min(counted.pool.cached, int(not counted.pool.free)))
        if not all(counted.pool.free for counted in self.pools.states):
            return
        states = [counted.pool.take(1)[0] for counted in self.pools.states]
        self.cache.keep_states(row.prefix, tokens, states)
        self._left(row, self.keys(tokens, row.salt), states)

    def release(self, row: Row) -> None:
        self.rows.remove(row)
        for counted, pages in zip(self.pools.windows, row.windows, strict=True):
            for block in pages:
                if block:
                    counted.free(block)
        for counted, block in row.states:
            counted.free(block)
        for pool, pages in zip(self.pools.full, row.full, strict=True):
            pool.release(pages[row.prefix.tokens // self.size :])
        self.cache.release(row.prefix)
        self._prune()

    def evict(self, count: int) -> None:
        """Leaves go, with all that any group has there."""
        before = self.pools.full[0].cached
        assert self.cache.evict(count) == min(count, before)
        gone = [key for key in self.known if self.cache.known(list(key[1]), key[0]) < len(key[1])]
        assert len(gone) == min(count, before)
        for key in gone:
            del self.known[key]

    def give_up(self, counted: Counted, count: int) -> None:
        before, held = set(counted.nodes), self.held(counted)
        self.cache.give_up(counted, count)
        gone = before - set(counted.nodes)
        assert len(gone) == count
        assert not gone & set(held)
        for page in self.known.values():
            page.states = self._without(page.states, self.pools.states, counted, gone)
            page.windows = self._without(page.windows, self.pools.windows, counted, gone)
        self._prune()

    def _without(
        self, blocks: list[int], groups: tuple[Counted, ...], counted: Counted, gone: set[int]
    ) -> list[int]:
        return [0 if c is counted and b in gone else b for c, b in zip(groups, blocks, strict=True)]

    def _prune(self) -> None:
        """Where no group keeps everything, the tree drops what has nothing left; it need not do so at once."""
        if not self.pools.full:
            for key in [k for k in self.known if self.cache.known(list(k[1]), k[0]) < len(k[1])]:
                page = self.known.pop(key)
                assert not any((*page.windows, *page.states))


GROUPS = {
    "all": lambda size: CacheGroup("all", (), size),
    "too": lambda size: CacheGroup("too", (), size),
    "near": lambda size: CacheGroup("near", (), size, window=2),
    "far": lambda size: CacheGroup("far", (), size, window=3 * size),
    "state": lambda size: CacheGroup("state", (), None),
    "conv": lambda size: CacheGroup("conv", (), None),
}


@settings(max_examples=200, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_a_prefix_is_valid_where_every_group_can_go_on(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 3]))
    names = data.draw(st.lists(st.sampled_from(list(GROUPS)), min_size=1, max_size=4, unique=True))
    cache = CacheSpec(size, tuple(GROUPS[name](size) for name in names))
    driver = Driver(size, cache, data.draw(st.integers(2, 30)), data.draw(st.sampled_from(list(POLICIES))))
    events = ["acquire", "insert", "insert", "insert", "slide", "keep", "release", "evict", "give up"]
    for _ in range(40):
        event = data.draw(st.sampled_from(events))
        row = data.draw(st.sampled_from(driver.rows)) if driver.rows else None
        tokens = [t for token in data.draw(st.lists(st.integers(0, 1), max_size=6)) for t in [token] * size]
        counted = data.draw(st.sampled_from(driver.pools.counted)) if driver.pools.counted else None
        if event == "acquire":
            driver.acquire(tokens, data.draw(st.sampled_from(["", "b"])))
        elif event == "insert" and row:
            driver.insert(
                row, tokens + [0] * data.draw(st.sampled_from([0, 0, size - 1])), data.draw(st.booleans())
            )
        elif event == "slide" and row:
            driver.slide(row, data.draw(st.integers(0, 4)))
        elif event == "keep" and row and driver.pools.states:
            driver.keep(row, tokens)
        elif event == "release" and row:
            driver.release(row)
        elif event == "evict" and driver.pools.full:
            driver.evict(data.draw(st.integers(0, 9)))
        elif event == "give up" and counted is not None:
            driver.give_up(counted, data.draw(st.integers(0, counted.pool.cached)))
        driver.check()
    for row in list(driver.rows):
        driver.release(row)
        driver.check()
    driver.cache.reset()
    assert all(pool.free == pool.usable for pool in driver.pools.by_name.values())


def test_a_window_that_lost_a_page_is_valid_elsewhere() -> None:
    """Pages of a prefix that its holder slid over go first; what is behind them stays valid."""
    spec = CacheSpec(2, (CacheGroup("kv", (), 2), CacheGroup("near", (), 2, window=3)))
    pools = Pools(spec, {"kv": 20, "near": 20})
    cache = PrefixCache(pools, 2)
    (near,) = pools.windows
    tokens = list(range(10))
    pages = [pools.full[0].take(5), near.pool.take(5)]
    prefix = cache.insert(cache.acquire([]), tokens, pages)
    for page in pages[1][:3]:
        near.free(page)
    cache.give_up(near, 3)
    assert [cache.match(tokens[:n]) for n in (2, 4, 6, 8, 10)] == [0, 0, 0, 8, 10]
    held = cache.acquire(tokens[:8])
    assert (held.tokens, held.tails) == (8, [pages[1][3:4]])
    cache.check()
    assert prefix.pages == pages[0]


def test_a_state_is_found_only_where_it_was_left() -> None:
    spec = CacheSpec(2, (CacheGroup("kv", (), 2), CacheGroup("state", (), None)))
    pools = Pools(spec, {"kv": 20, "state": 9})
    cache = PrefixCache(pools, 2)
    (states,) = pools.states
    tokens = list(range(8))
    first = cache.insert(cache.acquire([]), tokens, [pools.full[0].take(4)], states.pool.take(1))
    assert [cache.match(tokens[:n]) for n in (4, 6, 8)] == [0, 0, 8]
    assert cache.known(tokens[:4]) == 4
    (block,) = states.pool.take(1)
    cache.keep_states(cache.acquire([]), tokens[:4], [block])
    assert [cache.match(tokens[:n]) for n in (4, 6, 8)] == [4, 4, 8]
    assert cache.acquire(tokens[:6]).states == [block]
    assert first.tokens == 8
    cache.check()


@pytest.mark.parametrize("salt", ["", "other"])
def test_what_goes_on_behind_a_forgotten_prefix_is_not_put_beside_the_same_of_another(salt: str) -> None:
    """Two rows that began with a prefix, forgotten since, compute the same: the second's pages stay its own."""
    pools = Pools(CacheSpec(1, (CacheGroup("kv", (), 1),)), {"kv": 9})
    cache = PrefixCache(pools, 1)
    one = cache.insert(cache.acquire([5], salt), [5], [pools.first.take(1)])
    two = cache.acquire([5], salt)
    cache.forget(salt)
    assert cache.ends(one, [5, 6])
    one = cache.insert(one, [5, 6], [one.pages + pools.first.take(1)])
    assert not cache.ends(two, [5, 6])
    assert cache.match([5, 6], salt) == 0
