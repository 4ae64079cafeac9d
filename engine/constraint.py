"""What may come next in a sequence, where its caller restricts it."""

from __future__ import annotations

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

    def allow(self, words: np.ndarray) -> None:
        """Write the mask of tokens that may follow.

        Args:
            words: int32 ``[cdiv(vocabulary, 32)]``; bit i % 32 of word i // 32 is token i's.
        """
        ...

    def copy(self) -> Constraint:
        """The same state, which goes its own way from here."""
        ...
