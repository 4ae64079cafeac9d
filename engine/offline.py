"""The order of offline work: whoever begins alike is admitted one after the other, and long outputs in time.

Prompts are taken in the order of their tokens, round and round, so that a prefix is computed once and stays while
it is used, however the input is sorted. Towards the end of the work, what may generate for as long as all that is
left goes first: nobody shall run alone at the end.

Only the order of admission changes: results come back to their places.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import TypeAlias

from makeready.engine.sequence import TokenSequence

KEY_TOKENS = 4096  # of a prompt, by which it is sorted: 16 KiB each of so many as wait

_Key: TypeAlias = "tuple[str, bytes, int]"


class OfflineOrder:
    """Sequences that wait, in the order of their tokens and by what they may generate.

    Args:
        running: how many rows run, and how many tokens they may still generate together.
        waiting: at first.
    """

    def __init__(self, running: Callable[[], tuple[int, int]], waiting: Iterable[TokenSequence] = ()) -> None:
        self._running = running
        self._keys: dict[TokenSequence, _Key] = {}
        self._lefts: dict[TokenSequence, tuple[int, int]] = {}
        self._alike: list[TokenSequence] = []
        self._long: list[TokenSequence] = []
        self._tokens = 0  # that those who wait may generate
        self._rows = 0  # that run, or did lately
        self._last: _Key = ("", b"", -1)  # where the round is
        for sequence in waiting:
            self.add(sequence)

    def add(self, sequence: TokenSequence) -> None:
        """A sequence waits, for the first time or again."""
        ids = sequence.ids()[:KEY_TOKENS]
        self._keys[sequence] = (sequence.salt, ids.tobytes(), sequence.ticket)
        self._lefts[sequence] = (-sequence.left, sequence.ticket)
        self._tokens += sequence.left
        insort(self._alike, sequence, key=self._keys.__getitem__)
        insort(self._long, sequence, key=self._lefts.__getitem__)

    def remove(self, sequence: TokenSequence) -> None:
        """A sequence waits no more."""
        del self._alike[bisect_left(self._alike, self._keys[sequence], key=self._keys.__getitem__)]
        del self._long[bisect_left(self._long, self._lefts[sequence], key=self._lefts.__getitem__)]
        self._tokens += self._lefts.pop(sequence)[0]
        del self._keys[sequence]

    def admitted(self, sequence: TokenSequence) -> None:
        """A sequence was chosen and runs: the round goes on behind it, unless it was for its length."""
        self._rows = max(self._rows, self._running()[0])
        if sequence not in self._urgent(1):
            self._last = self._keys[sequence]

    def order(self, count: int) -> list[TokenSequence]:
        """The next ``count`` to admit, as things stand."""
        # Several may have ended in the last step.
        self._rows = max(self._running()[0], self._rows - 1)
        first = self._urgent(count)
        at = bisect_right(self._alike, self._last, key=self._keys.__getitem__)
        # Not more of the round than may be wanted: any of these may be among the first.
        round_ = chain(islice(self._alike, at, at + 2 * count), islice(self._alike, min(at, 2 * count)))
        taken = set(first)
        return [*first, *(sequence for sequence in round_ if sequence not in taken)][:count]

    def _urgent(self, count: int) -> list[TokenSequence]:
        """Those that may generate for longer than all the others take, the longest first."""
        if not self._rows:
            return []
        steps = (self._running()[1] + self._tokens) / self._rows
        found: list[TokenSequence] = []
        for sequence in islice(self._long, count):
            if -self._lefts[sequence][0] < steps:
                break
            found.append(sequence)
        return found
