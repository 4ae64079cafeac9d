"""How many tokens sequences generate that may end before their limit, learned from those that ended.

R running rows
"""

from __future__ import annotations

import numpy as np

from makeready.engine.sequence import TokenSequence

# What is remembered, the last that ended; and how many of them say more than an assumption does.
REMEMBERED, ENOUGH = 1024, 32
ROUNDING = 1e-6  # of a token, by which products of shares and limits may be off
_GOLDEN = 0.6180339887498949


def may_end_early(sequence: TokenSequence) -> bool:
    """Whether anything but its limit can end a sequence."""
    sampling = sequence.sampling
    return bool(sequence.end_ids or sequence.constraint is not None or sampling.stop or sampling.stop_regex)


def lot(ticket: int) -> float:
    """A number from 0 to 1 for each ticket; those of neighbouring tickets are spread evenly."""
    return ticket * _GOLDEN % 1.0


class OutputLengths:
    """The share of their limits that sequences used, and what it says of those that run.

    As in the Past-Future scheduler (arXiv 2507.10150) a row is expected to come to a length drawn from those that
    are longer than what it has by now. Here each row keeps its lot, so that forecasts do not jump from step to step
    and all processes make the same; lots are spread evenly, so that the sum over many rows is close to its mean.

    Args:
        assumed: share of what a row may still generate that it is expected to, before enough have ended.
        least: share that it is expected to at least, whatever was learned.
    """

    def __init__(self, assumed: float, least: float) -> None:
        self._assumed, self._least = assumed, least
        self._shares_N, self._learned = np.ones(REMEMBERED), 0
        self._sorted_N: np.ndarray | None = None

    def learn(self, sequence: TokenSequence) -> None:
        """A sequence that might have ended early came to its end."""
        self._shares_N[self._learned % REMEMBERED] = len(sequence.output) / sequence.most
        self._learned += 1
        self._sorted_N = None

    def expected(self, left_R: np.ndarray, most_R: np.ndarray, lots_R: np.ndarray) -> np.ndarray:
        """Tokens that rows will still generate, int64, at least one where one is left.

        Args:
            left_R: that they may still generate.
            most_R: that they might generate when they came.
            lots_R: what is drawn for each, see :func:`lot`.
        """
        if self._learned < ENOUGH:
            expected = self._assumed * left_R
        else:
            if self._sorted_N is None:
                # Nobody uses more than all of it, and somebody may be about to.
                self._sorted_N = np.append(np.sort(self._shares_N[: self._learned]), 1.0)
            shares_N, count = self._sorted_N, len(self._sorted_N)
            longer = shares_N.searchsorted(1.0 - left_R / most_R, side="right")
            picked = longer + (lots_R * (count - longer)).astype(np.int64)
            expected = shares_N[np.minimum(picked, count - 1)] * most_R - (most_R - left_R)
            expected = np.maximum(expected, self._least * left_R)
        whole = np.ceil(expected - ROUNDING).astype(np.int64)
        return np.minimum(np.maximum(whole, 1), left_R)
