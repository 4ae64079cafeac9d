"""Blocks of windows and states, which rows hold one by one.

Pages that are read to the end are held as a whole prefix. Of a group with a window a row holds only what its
next tokens read, of a group of states the one state that it goes on from: so each block counts its holders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from makeready.engine.kv.eviction import EvictionOrder
from makeready.engine.kv.pool import PagePool


class Place(Protocol):
    """Where the prefix cache has a block."""

    created: int
    hits: int
    priority: int


@dataclass(eq=False, slots=True)
class _Idle:
    """A block of the tree that nobody holds, and its place's figures when it was let go."""

    block: int
    used: int
    created: int
    hits: int
    priority: int
    entry: int = 0


class Counted:
    """The blocks of one group: owned by one row, or the tree's with the number of rows that hold each.

    Args:
        pool: of the group.
        policy: of eviction.
        tail: pages before a page border that the tokens behind it read; of states, 0.

    Attributes:
        nodes: where the tree has each of its blocks.
    """

    def __init__(self, pool: PagePool, policy: str, tail: int = 0) -> None:
        self.pool = pool
        self.tail = tail
        self.nodes: dict[int, Place] = {}
        self._holders: dict[int, int] = {}
        self._idle: dict[int, _Idle] = {}
        self._order = EvictionOrder(policy)
        self._ticks = 0

    def share(self, block: int, node: Place) -> None:
        """A block that a row owns becomes the tree's; the row holds it on."""
        self.pool.share([block])
        self.nodes[block] = node
        self._holders[block] = 1

    def hold(self, block: int) -> None:
        """One more row holds a block of the tree."""
        if not self._holders[block]:
            self._order.remove(self._idle.pop(block))
            self.pool.hold([block])
        self._holders[block] += 1

    def free(self, block: int) -> None:
        """A row has no use for a block any more: it is free if it was the row's own, else the tree's to keep."""
        node = self.nodes.get(block)
        if node is None:
            self.pool.release([block])
            return
        self._holders[block] -= 1
        if not self._holders[block]:
            self._ticks += 1
            self.pool.park([block])
            idle = self._idle[block] = _Idle(block, self._ticks, node.created, node.hits, node.priority)
            self._order.add(idle)

    def first(self) -> int:
        """The block of the tree to give up first."""
        idle = self._order.first()
        assert isinstance(idle, _Idle)
        return idle.block

    def drop(self, block: int) -> None:
        """The tree has this block no more: it is free, or its only holder's own."""
        del self.nodes[block]
        holders = self._holders.pop(block)
        assert holders <= 1, f"block {block} leaves the tree and has {holders} holders"
        if holders:
            self.pool.own([block])
        else:
            self._order.remove(self._idle.pop(block))
            self.pool.drop([block])

    def check(self, found: dict[int, Place]) -> None:
        """Assert that the tree's blocks are those that were ``found`` in it, where they were."""
        assert self.nodes == found, "the tree and the count of its blocks differ"
        idle = {block for block, holders in self._holders.items() if not holders}
        assert idle == set(self._idle), "the eviction order is not of the blocks that nobody holds"
        assert len(idle) == self.pool.cached == len(self._order), (
            "the pool and the tree differ in what is cached"
        )
