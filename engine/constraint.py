"""What may come next in a sequence, where its caller restricts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
