"""What may come next in a sequence, where its caller restricts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Constraint(Protocol):
    """The tokens that a sequence may go on with, which follow from those that it has."""

    @property
    def error(self) -> str | None:
        """Why nothing more can be said; its sequence ends with that."""
        ...

    def take(self, token: int) -> bool:
        """Take in a token that was sampled; whether none may follow."""
        ...

    def forced(self) -> Sequence[int]:
        """The tokens that are sure to come next, which depend on those taken in alone; none where there is a choice.

        From then on each of them is all that :meth:`allow` allows until it was taken in.
        """
        ...

    def allow(self, words: np.ndarray) -> None:
        """Write the mask of tokens that may follow.

        Args:
            words: int32 ``[cdiv(vocabulary, 32)]``; bit i % 32 of word i // 32 is token i's.
        """
        ...

    def copy(self) -> Constraint:
        """The same state, which goes its own way from here."""
        ...

    @classmethod
    def allow_all(cls, constraints: Sequence[Any], words: np.ndarray, rows: Sequence[int]) -> None:
        """:meth:`allow` for several of this class, at once where that is faster.

        Args:
            words: int32 ``[R, cdiv(vocabulary, 32)]``.
            rows: of ``words``, where the mask of each goes.
        """
        ...


def allow_along(constraint: Constraint, drafts: Sequence[int], words: np.ndarray, *, forces: bool) -> int:
    """Write the mask of what may come next, and of what may behind each draft as far as they may come.

    Args:
        words: int32 ``[1 + len(drafts), cdiv(vocabulary, 32)]``.
        forces: tokens that are sure to come are asked for behind each.

    Returns:
        How many masks were written. ``constraint`` stays where it is.
    """
    constraint.allow(words[0])
    ahead = constraint.copy() if drafts and constraint.error is None else None
    for place, draft in enumerate(drafts, 1):
        if ahead is None or not words[place - 1].view(np.uint32)[draft // 32] >> draft % 32 & 1:
            return place
        if ahead.take(draft) or ahead.error is not None:
            return place
        if forces:
            ahead.forced()
        ahead.allow(words[place])
        if ahead.error is not None:
            return place
    return 1 + len(drafts)


def allow_all(constraints: Sequence[Constraint], words: np.ndarray) -> None:
    """Write the mask of each constraint to the row of ``words`` in its place; see :meth:`Constraint.allow_all`."""
    for kind in dict.fromkeys(map(type, constraints)):
        rows = [row for row, each in enumerate(constraints) if type(each) is kind]
        kind.allow_all([constraints[row] for row in rows], words, rows)
