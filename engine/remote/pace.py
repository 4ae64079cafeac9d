"""When a full queue has room again, from how long steps take and how long answers turn out to be."""

from __future__ import annotations

import math
from collections.abc import Collection

from makeready.engine.sequence import LENGTH, STOP, TokenSequence

RETRY_SECONDS = (1.0, 600.0)  # least and most that a request is told to wait
MEMORY = 0.1  # weight of the latest step or answer in the means


class Pace:
    """What was measured of an engine's sequences.

    Attributes:
        step_seconds: of a step, lately.
        share: of the tokens that an answer may have, how many it had, lately; most end before their limit.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.share = 1.0

    def step(self, seconds: float) -> None:
        """A step took so long."""
        self.step_seconds += (seconds - self.step_seconds) * (MEMORY if self.step_seconds else 1.0)

    def ended(self, sequence: TokenSequence) -> None:
        """A sequence has ended; those that were broken off say nothing of how long answers are."""
        if sequence.finish_reason in (STOP, LENGTH):
            self.share += (len(sequence.output) / sequence.most - self.share) * MEMORY

    def seconds_until(self, places: int, running: Collection[TokenSequence]) -> float:
        """How long until so many places in the queue are free, in whole seconds.

        Each sequence that ends lets one in that waits, and those that are let in last as long as the ones before.
        """
        low, high = RETRY_SECONDS
        if not running:
            return low
        lasts = sorted(max(1.0, self.share * sequence.most - len(sequence.output)) for sequence in running)
        whole = self.share * sum(sequence.most for sequence in running) / len(running)
        waves, place = divmod(max(places, 1) - 1, len(lasts))
        seconds = (lasts[place] + waves * whole) * self.step_seconds
        return float(math.ceil(min(max(seconds, low), high)))
