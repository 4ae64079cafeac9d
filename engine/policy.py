"""Whom to admit first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator

from makeready.engine.kv.radix import PrefixCache
from makeready.engine.offline import OfflineOrder
from makeready.engine.options import AUTO, FCFS, LPM, OFFLINE, SchedulerOptions
from makeready.engine.ranking import RANKINGS
from makeready.engine.sequence import TokenSequence

# Policies that go by the cache look at so many of those that came first: a look costs 2 to 20 us, and with so
# many to choose from a batch is filled with what belongs together.
WINDOW = 128


class WaitingQueue:
    """Sequences that wait.

    Kept in sorted lists: in order of arrival, which a sequence that was sent back keeps, and in order of its
    rank where the policy ranks each by itself. Adding and removing move a few pointers: 20 us at 100,000.

    Args:
        running: how many rows run, and how many tokens they may still generate together; for offline work.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        cache: PrefixCache | None,
        page_size: int,
        running: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self._options = options
        self._running = running
        self._cache = cache
        self._size = page_size
        self._tickets = 0
        self._arrived: list[TokenSequence] = []
        self._ranked: list[TokenSequence] = []
        self._ranks: dict[TokenSequence, tuple[float, int]] = {}
        ranking = RANKINGS.get(options.policy)
        self._rank = None if ranking is None else ranking(options)
        self._offline: OfflineOrder | None = None
        self.batch(False)

    def batch(self, on: bool) -> None:
        """Whether what comes is a batch of offline work, for which the policy ``auto`` has an order of its own."""
        if self._options.policy == OFFLINE or (on and self._options.policy == AUTO):
            self._offline = self._offline or OfflineOrder(self._running, self._arrived)
        else:
            self._offline = None

    def __len__(self) -> int:
        return len(self._arrived)

    def __iter__(self) -> Iterator[TokenSequence]:
        """In order of arrival."""
        return iter(self._arrived)

    def __contains__(self, sequence: object) -> bool:
        at = (
            bisect_left(self._arrived, sequence.ticket, key=_ticket)
            if isinstance(sequence, TokenSequence)
            else 0
        )
        return at < len(self._arrived) and self._arrived[at] is sequence

    def add(self, sequence: TokenSequence) -> None:
        """Let a sequence wait, for the first time or again."""
        if sequence.ticket < 0:
            self._tickets += 1
            sequence.ticket = self._tickets
        insort(self._arrived, sequence, key=_ticket)
        if self._offline is not None:
            self._offline.add(sequence)
        if self._rank is not None:
            self._ranks[sequence] = (self._rank(sequence), sequence.ticket)
            insort(self._ranked, sequence, key=self._ranks.__getitem__)

    def remove(self, sequence: TokenSequence) -> None:
        """A sequence waits no more."""
        del self._arrived[bisect_left(self._arrived, sequence.ticket, key=_ticket)]
        if self._offline is not None:
            self._offline.remove(sequence)
        if self._rank is not None:
            del self._ranked[bisect_left(self._ranked, self._ranks[sequence], key=self._ranks.__getitem__)]
            del self._ranks[sequence]

    def admitted(self, sequence: TokenSequence) -> None:
        """A sequence waits no more, for it was chosen: one that came before it was passed over."""
        if self._offline is not None and not sequence.urgent:
            self._offline.admitted(sequence)
        self.remove(sequence)
        if self._arrived and self._arrived[0].ticket < sequence.ticket:
            self._arrived[0].passed_over += 1

    def order(self, count: int) -> list[TokenSequence]:
        """The next ``count`` sequences to admit, as things stand; fewer if fewer wait or are looked at."""
        if self._rank is not None:
            order = self._ranked[:count]
        elif self._offline is not None:
            order = self._offline.order(count)
        elif self._options.policy in (FCFS, AUTO):
            return self._arrived[:count]
        else:
            window = self._arrived[:WINDOW]
            order = self._by_match(window) if self._options.policy == LPM else self._by_weight(window)
        if not order:
            return order
        first = self._arrived[0]
        left = self._options.max_wait - first.passed_over
        if left > 0:
            return order[: min(left, count)]
        first.urgent = True
        return [first, *(sequence for sequence in order if sequence is not first)][:count]

    def _by_match(self, sequences: list[TokenSequence]) -> list[TokenSequence]:
        """The longest cached prefix first, then who came first."""
        return sorted(sequences, key=lambda sequence: -self._match(sequence))

    def _by_weight(self, sequences: list[TokenSequence]) -> list[TokenSequence]:
        """Depth first through the tree of cached prefixes, at every fork where most sequences are first.

        Behind a prefix come first those whose own goes on, then those whose ends there.
        """
        paths = {sequence: self._path(sequence) for sequence in sequences}
        weight = Counter(key for path in paths.values() for key in path)
        # Between equals who came first, so that every process orders alike whatever the keys are.
        place = {key: (-weight[key], i) for i, key in enumerate(weight)}
        end = (1, 0)

        def branches(sequence: TokenSequence) -> list[tuple[int, int]]:
            path = paths[sequence]
            # Pages of equal weight in a row are of the same sequences: the first of them is enough to compare.
            new = [i for i, key in enumerate(path) if i == 0 or weight[key] < weight[path[i - 1]]]
            return [*(place[path[i]] for i in new), end]

        return sorted(sequences, key=branches)

    def _path(self, sequence: TokenSequence) -> list[int]:
        """Keys of the cached pages that a sequence begins with."""
        pages = self._match(sequence) // self._size
        return [sequence.page_key(page, self._size) for page in range(pages)]

    def _match(self, sequence: TokenSequence) -> int:
        assert self._cache is not None
        return self._cache.match(sequence.ids()[:-1], sequence.salt)


def _ticket(sequence: TokenSequence) -> int:
    return sequence.ticket
