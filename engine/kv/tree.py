"""The tree of the prefix cache: what it knows of sequences, and what of that is valid. Changes nothing."""

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

TOKEN_BYTES = 4


@dataclass(eq=False, slots=True)
class Node:
    """A run of pages behind ``parent``; ``run`` are their tokens as the bytes of int32.

    ``used`` and ``created`` are ticks; ``holders`` counts prefixes that end here or below. A root has no
    parent, no pages and a ``salt``.

    Attributes:
        pages: a list for each group that keeps everything, then for each with a window.
        states: a block for each group of states.
    """

    parent: Node | None
    run: bytes
    pages: list[list[int]]
    states: list[int]
    priority: int
    used: int
    created: int
    hits: int = 1
    holders: int = 1
    entry: int = 0
    children: dict[bytes, Node] = field(default_factory=dict)
    salt: str = ""


class Tree:
    """A radix tree over whole pages; see :class:`~makeready.engine.kv.radix.PrefixCache`, which grows it."""

    def __init__(self, pools: PagePool | Pools, page_size: int, policy: str = "lru") -> None:
        one = isinstance(pools, PagePool)
        self._full: tuple[PagePool, ...] = (pools,) if one else pools.full
        self._windows: tuple[Counted, ...] = () if one else pools.windows
        self._states: tuple[Counted, ...] = () if one else pools.states
        self.pool = self._full[0] if one or self._full else pools.first
        self._plain = not self._windows and not self._states  # all that the tree has is valid
        self.page_size = page_size
        self._key_bytes = page_size * TOKEN_BYTES
        self._roots: dict[str, Node] = {}
        self._order = EvictionOrder(policy)
        self._ticks = 0

    def match(self, tokens: Tokens, salt: str = "") -> int:
        """How many of the first tokens are a valid prefix, in whole pages; changes nothing."""
        if self._plain:
            return self.known(tokens, salt)
        return self._valid(self._path(tokens, salt)) * self.page_size

    def known(self, tokens: Tokens, salt: str = "") -> int:
        """How many of the first tokens are in the tree, in whole pages, valid or not."""
        return sum(count for _, count in self._path(tokens, salt)) * self.page_size

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

    def _count(self, node: Node) -> int:
        """Pages of a node."""
        return len(node.run) // self._key_bytes

    def _empty(self, node: Node) -> bool:
        """Whether no group has anything of a run; where one keeps everything that cannot be."""
        return not self._full and not any(node.states) and not any(any(its) for its in node.pages)

    def _path(self, tokens: Tokens, salt: str) -> list[tuple[Node, int]]:
        """Nodes that ``tokens`` begin with, and how many pages of each."""
        path: list[tuple[Node, int]] = []
        node, at = self._roots.get(salt), 0
        while node is not None and (found := self._continue(node, tokens, at)):
            path.append(found)
            node, count = found
            at += count * self.page_size
            if count < self._count(node):
                break
        return path

    def _valid(self, path: list[tuple[Node, int]]) -> int:
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

    def _continue(self, node: Node, tokens: Tokens, at: int) -> tuple[Node, int] | None:
        """The child that has the page of ``tokens[at:]``, and how many whole pages they share."""
        child = node.children.get(encode(tokens[at : at + self.page_size]))
        if child is None:
            return None
        run = child.run
        # Only as much is converted as this node can match: a long prompt with no match costs one page.
        wanted = encode(tokens[at : at + len(run) // TOKEN_BYTES])
        if wanted == run:
            return child, self._count(child)
        shorter = len(wanted) // self._key_bytes * self.page_size
        ours = np.frombuffer(run, np.int32, shorter)
        differs = ours != np.frombuffer(wanted, np.int32, shorter)
        first = int(differs.argmax()) if differs.any() else shorter
        return child, first // self.page_size

    def _nodes(self) -> Iterator[Node]:
        queue = [child for root in self._roots.values() for child in root.children.values()]
        while queue:
            node = queue.pop()
            yield node
            queue += node.children.values()


def encode(tokens: Tokens) -> bytes:
    """Tokens as the bytes of int32."""
    if isinstance(tokens, np.ndarray):
        return tokens.astype(np.int32, copy=False).tobytes()
    return array("i", tokens).tobytes()
