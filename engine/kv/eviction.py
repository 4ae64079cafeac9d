"""The order in which cached prefixes are given up."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

from makeready.engine.errors import RequestError


class Evictable(Protocol):
    """What the order looks at. Times are ticks of the cache's own clock, not seconds.

    ``entry`` is the order's own: which of its entries is the node's, 0 while it has none.
    """

    used: int
    created: int
    hits: int
    priority: int
    entry: int


# The smallest key goes first. Ties of the last two go by recency.
POLICIES: dict[str, Callable[[Evictable], tuple[int, int]]] = {
    "lru": lambda node: (node.used, 0),
    "lfu": lambda node: (node.hits, node.used),
    "fifo": lambda node: (node.created, 0),
    "priority": lambda node: (node.priority, node.used),
}


class EvictionOrder:
    """Leaves that nobody holds, the one to give up first in front.

    A heap with lazy deletion: a node that is taken out leaves its entry behind, which is recognised by its
    number when it comes to the front. Adding and removing cost O(log n).
    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise RequestError(f"there is no eviction policy {policy!r}; use one of {', '.join(POLICIES)}")
        self._key = POLICIES[policy]
        self._heap: list[tuple[tuple[int, int], int, Evictable]] = []
        self._entries = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, node: Evictable) -> None:
        """Put a node in; its key must not change while it is here."""
        self._entries += 1
        self._size += 1
        node.entry = self._entries
        heapq.heappush(self._heap, (self._key(node), node.entry, node))
        # Prefixes that come and go without any eviction would leave entries behind for ever.
        if len(self._heap) > 2 * self._size + 64:
            self._heap = [item for item in self._heap if item[2].entry == item[1]]
            heapq.heapify(self._heap)

    def remove(self, node: Evictable) -> None:
        """Take a node out, if it is in."""
        if node.entry:
            node.entry = 0
            self._size -= 1

    def first(self) -> Evictable:
        """The node to give up first; it stays in."""
        while True:
            _, entry, node = self._heap[0]
            if node.entry == entry:
                return node
            heapq.heappop(self._heap)
