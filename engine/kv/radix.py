"""The prefix cache: what was computed of sequences, found again by the tokens it was computed from.

A radix tree over whole pages. An edge is a run of pages, so a prompt that shares nothing is one node however
long it is; a run is split, always between two pages, where prompts part. The children of a node differ in
their first page, whose tokens are their key.

    root ── [system prompt: 12 pages] ─┬─ [question A: 3 pages] ── [answer A, question B: 5 pages]
                                       └─ [question C: 2 pages]

Who holds a prefix holds every node from the root to its end, so a node that nobody holds has no held node
below it, and all cached pages can be freed from the leaves on. Trees of different salts share nothing.

A node has what each cache group keeps of its run:

    everything   the block of each page
    a window     likewise, but 0 where it was given up or never there: a row holds those that it still reads,
                 any other may go, wherever it is
    a state      the block of the state behind the run's last token, or 0

A prefix is valid if every group has what a token behind it reads: all pages; the last pages before it; the
state exactly there. The tree may know more of a sequence than is valid.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

import numpy as np

from makeready.engine.kv.counted import Counted
from makeready.engine.kv.eviction import EvictionOrder
from makeready.engine.kv.pool import PagePool
from makeready.engine.kv.pools import Pools

# Token ids in order. An int32 array spares the conversion, 20 ns a token.
Tokens: TypeAlias = "Sequence[int] | np.ndarray"

_TOKEN_BYTES = 4


@dataclass(eq=False, slots=True)
class _Node:
    """A run of pages behind ``parent``; ``run`` are their tokens as the bytes of int32.

    ``used`` and ``created`` are ticks; ``holders`` counts prefixes that end here or below. A root has no
    parent, no pages and a ``salt``.

    Attributes:
        pages: a list for each group that keeps everything, then for each with a window.
        states: a block for each group of states.
    """

    parent: _Node | None
    run: bytes
    pages: list[list[int]]
    states: list[int]
    priority: int
    used: int
    created: int
    hits: int = 1
    holders: int = 1
    entry: int = 0
    children: dict[bytes, _Node] = field(default_factory=dict)
    salt: str = ""


@dataclass(eq=False, slots=True)
class Prefix:
    """A held prefix of a sequence: its first ``tokens`` tokens, a whole number of pages.

    Attributes:
        blocks: the pages of each group that keeps everything.
        tails: of each group with a window, the last pages, which a token behind the prefix reads.
        states: of each group of states, the block to go on from; 0 where the prefix is empty.

    Blocks of ``tails`` and ``states`` are held one by one, by whoever acquired the prefix: they are not let go
    with it.
    """

    blocks: list[list[int]]
    tokens: int
    priority: int
    _end: _Node | None  # None once the prefix was released or replaced
    tails: list[list[int]] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    @property
    def pages(self) -> list[int]:
        """The pages of the first group that keeps everything."""
        return self.blocks[0]


class PrefixCache:
    """Finds, holds, keeps and evicts prefixes.

    Args:
        pools: where blocks come from and go back to; a single pool is of a group that keeps everything.
        page_size: tokens a page.
        policy: what is evicted first: ``lru``, least recently used; ``lfu``, least often; ``fifo``, oldest;
            ``priority``, the lowest priority of those that used it.

    Raises:
        RequestError: there is no such policy.
    """

    def __init__(self, pools: PagePool | Pools, page_size: int, policy: str = "lru") -> None:
        one = isinstance(pools, PagePool)
        self._full: tuple[PagePool, ...] = (pools,) if one else pools.full
        self._windows: tuple[Counted, ...] = () if one else pools.windows
        self._states: tuple[Counted, ...] = () if one else pools.states
        self.pool = self._full[0] if one or self._full else pools.first
        self._plain = not self._windows and not self._states  # all that the tree has is valid
        self.page_size = page_size
        self._key_bytes = page_size * _TOKEN_BYTES
        self._roots: dict[str, _Node] = {}
        self._order = EvictionOrder(policy)
        self._ticks = 0

    @property
    def evictable(self) -> int:
        """Cached blocks of the first group that keeps everything, if any: what :meth:`evict` could free."""
        return self.pool.cached

    def match(self, tokens: Tokens, salt: str = "") -> int:
        """How many of the first tokens are a valid prefix, in whole pages; changes nothing."""
        if self._plain:
            return self.known(tokens, salt)
        return self._valid(self._path(tokens, salt)) * self.page_size

    def known(self, tokens: Tokens, salt: str = "") -> int:
        """How many of the first tokens are in the tree, in whole pages, valid or not."""
        return sum(count for _, count in self._path(tokens, salt)) * self.page_size

    def acquire(self, tokens: Tokens, salt: str = "", priority: int = 0) -> Prefix:
        """Hold the longest valid prefix of ``tokens``, in whole pages; possibly none.

        Args:
            tokens: of the sequence. Leave out the last one if it has to be run whatever is cached.
            salt: prefixes are found only among those inserted under the same salt.
            priority: of the request, for the policy of that name.
        """
        if not self._plain:
            tokens = tokens[: self.match(tokens, salt)]
        end = self._roots.get(salt)
        if end is None:
            end = self._roots[salt] = _Node(None, b"", [], [], 0, 0, 0, holders=0, salt=salt)
        end.holders += 1
        self._ticks += 1
        count, pages, end = self._descend(end, tokens, 0, priority)
        full = len(self._full)
        prefix = Prefix(pages[:full], count * self.page_size, priority, end)
        for counted, its in zip(self._windows, pages[full:], strict=True):
            tail = its[max(0, count - counted.tail) :]
            prefix.tails.append(tail)
            for block in tail:
                counted.hold(block)
        prefix.states = list(end.states) if count else [0] * len(self._states)
        for counted, block in zip(self._states, prefix.states, strict=True):
            if block:
                counted.hold(block)
        return prefix

    def insert(
        self, prefix: Prefix, tokens: Tokens, pages: list[list[int]], states: Sequence[int] = ()
    ) -> Prefix:
        """Put a sequence's full pages beyond ``prefix`` into the tree, and the state behind them.

        Args:
            prefix: what the sequence holds; the returned one replaces it.
            tokens: whose KV is in ``pages`` (or will be by the time that a later launch reads it), from the
                start of the sequence. A last page that is not full stays the caller's own.
            pages: of the sequence, for each group that keeps everything, then for each with a window, from its
                start, at least as many as are full. Those beyond ``prefix.tokens`` are owned by the caller, or,
                of a window, 0 where they were freed.
            states: for each group of states a block with the state behind the last full page, owned by the
                caller, or 0.

        Returns:
            A prefix of all full pages. Where the tree already had the same tokens, its pages stand in place
            of the caller's, which were released. Of windows and states the tree takes what it lacks, which
            the caller holds on; all else stays the caller's.
        """
        end = _live(prefix)
        self._ticks += 1
        size, start, full = self.page_size, prefix.tokens // self.page_size, len(tokens) // self.page_size
        assert all(len(own) >= full for own in pages), f"{full} full pages of tokens, too few pages"
        count, found, last = self._descend(end, tokens, start * size, prefix.priority)
        at, everything = start + count, len(self._full)
        for pool, own in zip(self._full, pages, strict=False):
            pool.release(own[start:at])
        if self._windows:
            self._fill(last, start, at, pages[everything:])
        if at < full:
            fresh, run = [own[at:full] for own in pages], _encode(tokens[at * size : full * size])
            for pool, own in zip(self._full, fresh, strict=False):
                pool.share(own)
            if last.parent is not None and last.hits == 1 and not last.children and not any(last.states):
                # A run that only this sequence ever used grows with it, chunk after chunk.
                last.run += run
                for its, own in zip(last.pages, fresh, strict=True):
                    its += own
            else:
                last = self._add(last, run, [list(own) for own in fresh], prefix.priority)
            for counted, own in zip(self._windows, fresh[everything:], strict=True):
                for block in own:
                    if block:
                        counted.share(block, last)
            found = [its + own for its, own in zip(found, fresh, strict=True)]
        if states and full >= start and last.parent is not None:
            self._leave_states(last, states)
        prefix._end = None
        blocks = [held + own for held, own in zip(prefix.blocks, found, strict=False)]
        return Prefix(blocks, max(start, full) * size, prefix.priority, last)

    def ends(self, prefix: Prefix, tokens: Tokens) -> bool:
        """Whether the tree knows no page of ``tokens`` behind ``prefix``, with which they begin."""
        return self._continue(_live(prefix), tokens, prefix.tokens) is None

    def keep_states(self, prefix: Prefix, tokens: Tokens, states: Sequence[int]) -> None:
        """Leave states behind ``tokens``, whole pages that go on behind ``prefix``, if the tree knows all of them.

        Args:
            states: as of :meth:`insert`.
        """
        node, at = _live(prefix), prefix.tokens
        while at < len(tokens) and (found := self._continue(node, tokens, at)):
            node, count = found
            at += count * self.page_size
            if count < self._count(node):
                if at < len(tokens):
                    return
                node = self._split(node, count)
        if at == len(tokens) and node.parent is not None:
            self._leave_states(node, states)
            if not node.entry:
                self._leaf(node)

    def release(self, prefix: Prefix) -> None:
        """Stop holding a prefix; pages that nobody else holds become cached."""
        node: _Node | None = _live(prefix)
        prefix._end = None
        self._ticks += 1
        while node is not None:
            node.holders -= 1
            node.used = self._ticks
            if not node.holders:
                self._left(node)
            node = node.parent

    def abandon(self, prefix: Prefix) -> None:
        """Stop holding a prefix as it was acquired, its tails and states too."""
        for counted, tail in zip(self._windows, prefix.tails, strict=True):
            for block in tail:
                counted.free(block)
        for counted, block in zip(self._states, prefix.states, strict=True):
            if block:
                counted.free(block)
        self.release(prefix)

    def evict(self, count: int) -> int:
        """Free up to ``count`` cached blocks of the first group, and as many of all that keep everything.

        The ends of the first leaves of the policy go first, with what other groups have there.

        Returns:
            How many were freed.
        """
        left = count = max(0, min(count, self.evictable))
        if not self._full:
            self.give_up((*self._windows, *self._states)[0], count)
            return count
        while left:
            node = self._order.first()
            assert isinstance(node, _Node)
            size = self._count(node)
            cut = max(0, size - left)
            left -= size - cut
            for pool, its in zip(self._full, node.pages, strict=False):
                pool.drop(its[cut:])
            if not self._plain:
                self._drop_counted(node, cut)
            if cut:
                node.pages, node.run = [its[:cut] for its in node.pages], node.run[: cut * self._key_bytes]
            else:
                self._remove(node)
        return count

    def give_up(self, counted: Counted, count: int) -> None:
        """Free ``count`` cached blocks of a window or a state, wherever they are in the tree."""
        for _ in range(count):
            block = counted.first()
            node = counted.nodes[block]
            assert isinstance(node, _Node)
            if counted in self._states:
                node.states[self._states.index(counted)] = 0
            else:
                its = node.pages[len(self._full) + self._windows.index(counted)]
                its[its.index(block)] = 0
            counted.drop(block)
            if not node.children and not node.holders and self._empty(node):
                self._order.remove(node)
                self._leaf(node)

    def forget(self, salt: str = "") -> None:
        """Find nothing any more of what is in the tree under ``salt``; who holds of it goes on to."""
        root = self._roots.pop(salt, None)
        if root is not None:
            self._ticks += 1
            root.salt = f"{salt}\0forgotten {self._ticks}"
            self._roots[root.salt] = root

    def reset(self) -> None:
        """Drop everything that nobody holds."""
        if self._full:
            self.evict(self.evictable)
        for counted in (*self._windows, *self._states):
            self.give_up(counted, counted.pool.cached)

    def check(self) -> None:
        """Assert that the tree is well formed and that the pools agree on every block of it."""
        cached = leaves = 0
        full, nodes = len(self._full), list(self._nodes())
        for node in nodes:
            assert len(node.run) == self._count(node) * self._key_bytes > 0, "a run is not of whole pages"
            assert all(len(its) == self._count(node) for its in node.pages), "a run has too few pages"
            assert all(all(its) for its in node.pages[:full]), "a page is missing"
            assert node.parent is not None
            assert node.parent.children[node.run[: self._key_bytes]] is node, "a child under a wrong key"
            assert node.parent.holders >= node.holders >= 0, "a held node below one that is not"
            leaf = not node.holders and not node.children
            assert bool(node.entry) == leaf, "the eviction order is not of the leaves that nobody holds"
            assert not leaf or not self._empty(node), "a node is left that has nothing"
            leaves += leaf
            cached += 0 if node.holders else self._count(node)
        for g, pool in enumerate(self._full):
            pages = [page for node in nodes for page in node.pages[g]]
            assert len(set(pages)) == len(pages), "a page is in the tree twice"
            assert cached == pool.cached, "the pool and the tree differ in what is cached"
        for g, counted in enumerate(self._windows, start=full):
            counted.check({page: node for node in nodes for page in node.pages[g] if page})
        for g, counted in enumerate(self._states):
            counted.check({node.states[g]: node for node in nodes if node.states[g]})
        assert leaves == len(self._order), "the eviction order has lost count"

    def _count(self, node: _Node) -> int:
        """Pages of a node."""
        return len(node.run) // self._key_bytes

    def _empty(self, node: _Node) -> bool:
        """Whether no group has anything of a run; where one keeps everything that cannot be."""
        return not self._full and not any(node.states) and not any(any(its) for its in node.pages)

    def _path(self, tokens: Tokens, salt: str) -> list[tuple[_Node, int]]:
        """Nodes that ``tokens`` begin with, and how many pages of each."""
        path: list[tuple[_Node, int]] = []
        node, at = self._roots.get(salt), 0
        while node is not None and (found := self._continue(node, tokens, at)):
            path.append(found)
            node, count = found
            at += count * self.page_size
            if count < self._count(node):
                break
        return path

    def _valid(self, path: list[tuple[_Node, int]]) -> int:
        """Pages of the longest prefix of ``path`` that every group can go on behind."""
        borders = list(accumulate((count for _, count in path), initial=0))
        end = borders[-1]
        known = [0]  # borders at which all states are
        if self._states:
            whole = zip(path, borders[1:], strict=True)
            known += [at for (node, n), at in whole if n == self._count(node) and all(node.states)]
        tails = [
            (counted.tail, [page for node, count in path for page in node.pages[g][:count]])
            for g, counted in enumerate(self._windows, start=len(self._full))
        ]
        while True:
            before = end
            for tail, pages in tails:
                at = end
                while at and end - at < tail:
                    at -= 1
                    if not pages[at]:
                        end = at
            if self._states:
                while known[-1] > end:
                    known.pop()
                end = known[-1]
            if end == before:
                return end

    def _continue(self, node: _Node, tokens: Tokens, at: int) -> tuple[_Node, int] | None:
        """The child that has the page of ``tokens[at:]``, and how many whole pages they share."""
        child = node.children.get(_encode(tokens[at : at + self.page_size]))
        if child is None:
            return None
        run = child.run
        # Only as much is converted as this node can match: a long prompt with no match costs one page.
        wanted = _encode(tokens[at : at + len(run) // _TOKEN_BYTES])
        if wanted == run:
            return child, self._count(child)
        shorter = len(wanted) // self._key_bytes * self.page_size
        ours = np.frombuffer(run, np.int32, shorter)
        differs = ours != np.frombuffer(wanted, np.int32, shorter)
        first = int(differs.argmax()) if differs.any() else shorter
        return child, first // self.page_size

    def _descend(
        self, node: _Node, tokens: Tokens, at: int, priority: int
    ) -> tuple[int, list[list[int]], _Node]:
        """Hold what the tree has of ``tokens[at:]`` below ``node``: pages, how many, the node they end with."""
        pages: list[list[int]] = [[] for _ in (*self._full, *self._windows)]
        total = 0
        while found := self._continue(node, tokens, at + total * self.page_size):
            child, count = found
            node = child if count == self._count(child) else self._split(child, count)
            if not node.holders:
                for pool, its in zip(self._full, node.pages, strict=False):
                    pool.hold(its)
                self._order.remove(node)
            node.holders += 1
            node.hits += 1
            node.used = self._ticks
            node.priority = max(node.priority, priority)
            total += count
            for held, its in zip(pages, node.pages, strict=True):
                held += its
        return total, pages, node

    def _fill(self, node: _Node, start: int, stop: int, pages: list[list[int]]) -> None:
        """Give the tree what its windows lack of pages ``start:stop``, which end with ``node``."""
        while stop > start:
            begin = stop - self._count(node)
            for counted, its, own in zip(self._windows, node.pages[len(self._full) :], pages, strict=True):
                for i, block in enumerate(own[begin:stop]):
                    if block and not its[i]:
                        its[i] = block
                        counted.share(block, node)
            assert node.parent is not None
            node, stop = node.parent, begin

    def _leave_states(self, node: _Node, states: Sequence[int]) -> None:
        for g, (counted, block) in enumerate(zip(self._states, states, strict=True)):
            if block and not node.states[g]:
                node.states[g] = block
                counted.share(block, node)

    def _drop_counted(self, node: _Node, cut: int) -> None:
        """Windows and states let go of a node's pages from ``cut`` on."""
        for counted, its in zip(self._windows, node.pages[len(self._full) :], strict=True):
            for block in its[cut:]:
                if block:
                    counted.drop(block)
        for counted, block in zip(self._states, node.states, strict=True):
            if block:
                counted.drop(block)
        node.states = [0] * len(node.states)

    def _split(self, node: _Node, count: int) -> _Node:
        """Cut a run after ``count`` pages; returns the new node with the first part.

        The second part stays the same object: prefixes that end with this run still do.
        """
        assert node.parent is not None
        cut = count * self._key_bytes
        pages, states = [its[:count] for its in node.pages], [0] * len(node.states)
        head = _Node(node.parent, node.run[:cut], pages, states, node.priority, node.used, node.created)
        head.hits, head.holders = node.hits, node.holders
        head.children[node.run[cut : cut + self._key_bytes]] = node
        node.parent.children[node.run[: self._key_bytes]] = head
        node.parent, node.run, node.pages = head, node.run[cut:], [its[count:] for its in node.pages]
        for counted, its in zip(self._windows, pages[len(self._full) :], strict=True):
            counted.nodes.update((block, head) for block in its if block)
        if (
            not node.holders and not node.children and self._empty(node)
        ):  # all that was left is in the first part
            self._order.remove(node)
            head.children.clear()
        return head

    def _add(self, parent: _Node, run: bytes, pages: list[list[int]], priority: int) -> _Node:
        states = [0] * len(self._states)
        node = _Node(parent, run, pages, states, priority, self._ticks, self._ticks)
        parent.children[run[: self._key_bytes]] = node
        return node

    def _left(self, node: _Node) -> None:
        """The last holder of a node is gone."""
        for pool, its in zip(self._full, node.pages, strict=False):
            pool.park(its)
        self._leaf(node)

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None
        self._order.remove(node)
        del node.parent.children[node.run[: self._key_bytes]]
        if not node.parent.holders:
            self._leaf(node.parent)

    def _leaf(self, node: _Node) -> None:
        """Let a node that nobody holds be evicted, if nothing is below it; what has nothing goes at once."""
        while not node.children and not node.holders:
            if node.parent is None:
                del self._roots[node.salt]
                return
            if not self._empty(node):
                self._order.add(node)
                return
            del node.parent.children[node.run[: self._key_bytes]]
            node = node.parent

    def _nodes(self) -> Iterator[_Node]:
        queue = [child for root in self._roots.values() for child in root.children.values()]
        while queue:
            node = queue.pop()
            yield node
            queue += node.children.values()


def _live(prefix: Prefix) -> _Node:
    assert prefix._end is not None, "the prefix was released or replaced by an insert"
    return prefix._end


def _encode(tokens: Tokens) -> bytes:
    if isinstance(tokens, np.ndarray):
        return tokens.astype(np.int32, copy=False).tobytes()
    return array("i", tokens).tobytes()
