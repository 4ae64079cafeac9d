"""Masks of the tokens that may come, from constraints to what a step that stands at its cut is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from makeready.engine.batch import Batch
from makeready.engine.constraint import Constraint, allow_all, allow_along
from makeready.graphs.executable.base import Pending
from makeready.graphs.plan.spec import Limits

if TYPE_CHECKING:
    from makeready.engine.sequence import TokenSequence


class Masks:
    """What slots have on the device: masks of as many places as a step may fill, for places in turn."""

    def __init__(self, limits: Limits) -> None:
        shape = limits.slots, limits.mask_places, limits.mask_words
        self._held = np.zeros(shape, np.int32)
        self._rows = np.zeros(shape[::2], np.int32)

    def of(
        self, batch: Batch, pending: Pending, rows: list[tuple[TokenSequence, Constraint]], *, forces: bool
    ) -> list[np.ndarray]:
        """Masks of the next places of each sequence, int32 ``[places, words]``; good until the next call.

        Behind tokens that the step guessed they go as far as these may come: what is sampled in the place of one that
        may not is another, and nothing behind it counts.

        Args:
            pending: the step of ``batch``.
            rows: sequences of it.
            forces: see :func:`~.constraint.allow_along`.
        """
        guesses = batch.kind.guesses(batch, pending.early()) if rows and batch.kind.most > 1 else None
        if guesses is None:
            masks = self._rows[: len(rows)]
            allow_all([constraint for _, constraint in rows], masks)
            return list(masks[:, None])
        drafts = dict(zip(batch.decoding, guesses, strict=True))
        made: list[np.ndarray] = []
        for sequence, constraint in rows:
            words = np.empty((1 + len(drafts[sequence]), self._rows.shape[1]), np.int32)
            made.append(words[: allow_along(constraint, drafts[sequence], words, forces=forces)])
        return made

    def changed(self, slot: int, place: int, masks: np.ndarray) -> np.ndarray | None:
        """What has to be written of ``slot``, from its beginning, so that it has the masks from ``place`` on."""
        held, end = self._held[slot], 0
        for number, mask in enumerate(masks, place):
            at = number % len(held)
            if not np.array_equal(held[at], mask):
                held[at], end = mask, max(end, at + 1)
        return held[:end].reshape(-1) if end else None
