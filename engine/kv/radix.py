"""The prefix cache: computed KV pages, found again by the tokens they were computed from.

A radix tree over whole pages. An edge is a run of pages, so a prompt that shares nothing is one node however
long it is; a run is split, always between two pages, where prompts part. The children of a node differ in
their first page, whose tokens are their key.

    root ── [system prompt: 12 pages] ─┬─ [question A: 3 pages] ── [answer A, question B: 5 pages]
                                       └─ [question C: 2 pages]

Who holds a prefix holds every node from the root to its end, so a node that nobody holds has no held node
below it, and all cached pages can be freed from the leaves on. Trees of different salts share nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from makeready.engine.kv.eviction import EvictionOrder
from makeready.engine.kv.pool import PagePool

# Token ids in order. An int32 array spares the conversion, 20 ns a token.
Tokens: TypeAlias = "Sequence[int] | np.ndarray"

_TOKEN_BYTES = 4


@dataclass(eq=False, slots=True)
class _Node:
    """A run of pages behind ``parent``; ``run`` are their tokens as the bytes of int32.

    ``used`` and ``created`` are ticks; ``holders`` counts prefixes that end here or below. A root has no
    parent, no pages and a ``salt``.
    """

    parent: _Node | None
    run: bytes
    pages: list[int]
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
    """A held prefix of a sequence: ``pages`` with the first ``tokens`` tokens, a whole number of pages."""

    pages: list[int]
    tokens: int
    priority: int
    _end: _Node | None  # None once the prefix was released or replaced


class PrefixCache:
    """Finds, holds, keeps and evicts prefixes.

    Args:
        pool: where pages come from and go back to.
        page_size: tokens a page.
        policy: what is evicted first: ``lru``, least recently used; ``lfu``, least often; ``fifo``, oldest;
            ``priority``, the lowest priority of those that used it.

    Raises:
        RequestError: there is no such policy.
    """

    def __init__(self, pool: PagePool, page_size: int, policy: str = "lru") -> None:
        self.pool = pool
        self.page_size = page_size
        self._key_bytes = page_size * _TOKEN_BYTES
        self._roots: dict[str, _Node] = {}
        self._order = EvictionOrder(policy)
        self._ticks = 0

    @property
    def evictable(self) -> int:
        """Cached pages: what :meth:`evict` could free."""
        return self.pool.cached

    def match(self, tokens: Tokens, salt: str = "") -> int:
        """How many of the first tokens are in the tree, in whole pages; changes nothing."""
        node, at = self._roots.get(salt), 0
        while node is not None and (found := self._continue(node, tokens, at)):
            child, count = found
            at += count * self.page_size
            node = child if count == len(child.pages) else None
        return at

    def acquire(self, tokens: Tokens, salt: str = "", priority: int = 0) -> Prefix:
        """Hold the longest prefix of ``tokens`` that is in the tree, in whole pages; possibly none.

        Args:
            tokens: of the sequence. Leave out the last one if it has to be run whatever is cached.
            salt: prefixes are found only among those inserted under the same salt.
            priority: of the request, for the policy of that name.
        """
        end = self._roots.get(salt)
        if end is None:
            end = self._roots[salt] = _Node(None, b"", [], 0, 0, 0, holders=0, salt=salt)
        end.holders += 1
        self._ticks += 1
        pages, end = self._descend(end, tokens, 0, priority)
        return Prefix(pages, len(pages) * self.page_size, priority, end)

    def insert(self, prefix: Prefix, tokens: Tokens, pages: list[int]) -> Prefix:
        """Put a sequence's full pages beyond ``prefix`` into the tree.

        Args:
            prefix: what the sequence holds; the returned one replaces it.
            tokens: whose KV is in ``pages`` (or will be by the time that a later launch reads it), from the
                start of the sequence. A last page that is not full stays the caller's own.
            pages: of the sequence, from its start, at least as many as are full. Those beyond
                ``prefix.tokens`` are owned by the caller.

        Returns:
            A prefix of all full pages. Where the tree already had the same tokens, its pages stand in place
            of the caller's, which were released.
        """
        end = _live(prefix)
        self._ticks += 1
        size, start, full = self.page_size, len(prefix.pages), len(tokens) // self.page_size
        assert len(pages) >= full, f"{full} full pages of tokens, {len(pages)} pages"
        found, last = self._descend(end, tokens, start * size, prefix.priority)
        at = start + len(found)
        self.pool.release(pages[start:at])
        if at < full:
            fresh, run = pages[at:full], _encode(tokens[at * size : full * size])
            self.pool.share(fresh)
            if last.parent is not None and last.hits == 1 and not last.children:
                # A run that only this sequence ever used grows with it, chunk after chunk.
                last.run += run
                last.pages += fresh
            else:
                last = self._add(last, run, fresh, prefix.priority)
            found = found + fresh
        prefix._end = None
        return Prefix(prefix.pages + found, max(start, full) * size, prefix.priority, last)

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

    def evict(self, count: int) -> int:
        """Free up to ``count`` cached pages, the ends of the first leaves of the policy first.

        Returns:
            How many were freed.
        """
        left = count = max(0, min(count, self.evictable))
        while left:
            node = self._order.first()
            assert isinstance(node, _Node)
            cut = max(0, len(node.pages) - left)
            self.pool.drop(node.pages[cut:])
            left -= len(node.pages) - cut
            if cut:
                node.pages, node.run = node.pages[:cut], node.run[: cut * self._key_bytes]
            else:
                self._remove(node)
        return count

    def forget(self, salt: str = "") -> None:
        """Find nothing any more of what is in the tree under ``salt``; who holds of it goes on to."""
        root = self._roots.pop(salt, None)
        if root is not None:
            self._ticks += 1
            root.salt = f"{salt}\0forgotten {self._ticks}"
            self._roots[root.salt] = root

    def reset(self) -> None:
        """Drop everything that nobody holds."""
        self.evict(self.evictable)

    def check(self) -> None:
        """Assert that the tree is well formed and that the pool agrees on every page of it."""
        pages: list[int] = []
        cached = leaves = 0
        for node in self._nodes():
            assert len(node.run) == len(node.pages) * self._key_bytes > 0, "a run is not of whole pages"
            assert node.parent is not None
            assert node.parent.children[node.run[: self._key_bytes]] is node, "a child under a wrong key"
            assert node.parent.holders >= node.holders >= 0, "a held node below one that is not"
            leaf = not node.holders and not node.children
            assert bool(node.entry) == leaf, "the eviction order is not of the leaves that nobody holds"
            pages += node.pages
            leaves += leaf
            cached += 0 if node.holders else len(node.pages)
        assert len(set(pages)) == len(pages), "a page is in the tree twice"
        assert cached == self.pool.cached, "the pool and the tree differ in what is cached"
        assert leaves == len(self._order), "the eviction order has lost count"

    def _continue(self, node: _Node, tokens: Tokens, at: int) -> tuple[_Node, int] | None:
        """The child that has the page of ``tokens[at:]``, and how many whole pages they share."""
        child = node.children.get(_encode(tokens[at : at + self.page_size]))
        if child is None:
            return None
        run = child.run
        # Only as much is converted as this node can match: a long prompt with no match costs one page.
        wanted = _encode(tokens[at : at + len(child.pages) * self.page_size])
        if wanted == run:
            return child, len(child.pages)
        shorter = len(wanted) // self._key_bytes * self.page_size
        ours = np.frombuffer(run, np.int32, shorter)
        differs = ours != np.frombuffer(wanted, np.int32, shorter)
        first = int(differs.argmax()) if differs.any() else shorter
        return child, first // self.page_size

    def _descend(self, node: _Node, tokens: Tokens, at: int, priority: int) -> tuple[list[int], _Node]:
        """Hold what the tree has of ``tokens[at:]`` below ``node``; its pages, and the node it ends with."""
        pages: list[int] = []
        while found := self._continue(node, tokens, at + len(pages) * self.page_size):
            child, count = found
            node = child if count == len(child.pages) else self._split(child, count)
            if not node.holders:
                self.pool.hold(node.pages)
                self._order.remove(node)
            node.holders += 1
            node.hits += 1
            node.used = self._ticks
            node.priority = max(node.priority, priority)
            pages += node.pages
        return pages, node

    def _split(self, node: _Node, count: int) -> _Node:
        """Cut a run after ``count`` pages; returns the new node with the first part.

        The second part stays the same object: prefixes that end with this run still do.
        """
        assert node.parent is not None
        cut = count * self._key_bytes
        head = _Node(node.parent, node.run[:cut], node.pages[:count], node.priority, node.used, node.created)
        head.hits, head.holders = node.hits, node.holders
        head.children[node.run[cut : cut + self._key_bytes]] = node
        node.parent.children[node.run[: self._key_bytes]] = head
        node.parent, node.run, node.pages = head, node.run[cut:], node.pages[count:]
        return head

    def _add(self, parent: _Node, run: bytes, pages: list[int], priority: int) -> _Node:
        node = _Node(parent, run, pages, priority, self._ticks, self._ticks)
        parent.children[run[: self._key_bytes]] = node
        return node

    def _left(self, node: _Node) -> None:
        """The last holder of a node is gone."""
        if node.parent is not None:
            self.pool.park(node.pages)
        self._leaf(node)

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None
        self._order.remove(node)
        del node.parent.children[node.run[: self._key_bytes]]
        if not node.parent.holders:
            self._leaf(node.parent)

    def _leaf(self, node: _Node) -> None:
        """Let a node that nobody holds be evicted, if nothing is below it; an empty tree goes at once."""
        if node.children:
            return
        if node.parent is None:
            del self._roots[node.salt]
        else:
            self._order.add(node)

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
