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

from collections.abc import Sequence
from dataclasses import dataclass, field

from makeready.engine.kv.counted import Counted
from makeready.engine.kv.tree import Node, Tokens, Tree, encode


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
    _end: Node | None  # None once the prefix was released or replaced
    tails: list[list[int]] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    @property
    def pages(self) -> list[int]:
        """The pages of the first group that keeps everything."""
        return self.blocks[0]


class PrefixCache(Tree):
    """Finds, holds, keeps and evicts prefixes.

    Args:
        pools: where blocks come from and go back to; a single pool is of a group that keeps everything.
        page_size: tokens a page.
        policy: what is evicted first: ``lru``, least recently used; ``lfu``, least often; ``fifo``, oldest;
            ``priority``, the lowest priority of those that used it.

    Raises:
        RequestError: there is no such policy.
    """

    @property
    def evictable(self) -> int:
        """Cached blocks of the first group that keeps everything, if any: what :meth:`evict` could free."""
        return self.pool.cached

    def acquire(self, tokens: Tokens, salt: str = "", priority: int = 0) -> Prefix:
        """Hold the longest valid prefix of ``tokens``, in whole pages; possibly none.

        Args:
            tokens: of the sequence. Leave out the last one if it has to be run whatever is cached.
            salt: prefixes are found only among those inserted under the same salt.
            priority: of the sequence, for the policy of that name.
        """
        if not self._plain:
            tokens = tokens[: self.match(tokens, salt)]
        end = self._roots.get(salt)
        if end is None:
            end = self._roots[salt] = Node(None, b"", [], [], 0, 0, 0, holders=0, salt=salt)
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
            fresh, run = [own[at:full] for own in pages], encode(tokens[at * size : full * size])
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
        node: Node | None = _live(prefix)
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
            assert isinstance(node, Node)
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
            assert isinstance(node, Node)
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

    def _descend(
        self, node: Node, tokens: Tokens, at: int, priority: int
    ) -> tuple[int, list[list[int]], Node]:
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

    def _fill(self, node: Node, start: int, stop: int, pages: list[list[int]]) -> None:
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

    def _leave_states(self, node: Node, states: Sequence[int]) -> None:
        for g, (counted, block) in enumerate(zip(self._states, states, strict=True)):
            if block and not node.states[g]:
                node.states[g] = block
                counted.share(block, node)

    def _drop_counted(self, node: Node, cut: int) -> None:
        """Windows and states let go of a node's pages from ``cut`` on."""
        for counted, its in zip(self._windows, node.pages[len(self._full) :], strict=True):
            for block in its[cut:]:
                if block:
                    counted.drop(block)
        for counted, block in zip(self._states, node.states, strict=True):
            if block:
                counted.drop(block)
        node.states = [0] * len(node.states)

    def _split(self, node: Node, count: int) -> Node:
        """Cut a run after ``count`` pages; returns the new node with the first part.

        The second part stays the same object: prefixes that end with this run still do.
        """
        assert node.parent is not None
        cut = count * self._key_bytes
        pages, states = [its[:count] for its in node.pages], [0] * len(node.states)
        head = Node(node.parent, node.run[:cut], pages, states, node.priority, node.used, node.created)
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

    def _add(self, parent: Node, run: bytes, pages: list[list[int]], priority: int) -> Node:
        states = [0] * len(self._states)
        node = Node(parent, run, pages, states, priority, self._ticks, self._ticks)
        parent.children[run[: self._key_bytes]] = node
        return node

    def _left(self, node: Node) -> None:
        """The last holder of a node is gone."""
        for pool, its in zip(self._full, node.pages, strict=False):
            pool.park(its)
        self._leaf(node)

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        self._order.remove(node)
        del node.parent.children[node.run[: self._key_bytes]]
        if not node.parent.holders:
            self._leaf(node.parent)

    def _leaf(self, node: Node) -> None:
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


def _live(prefix: Prefix) -> Node:
    assert prefix._end is not None, "the prefix was released or replaced by an insert"
    return prefix._end
