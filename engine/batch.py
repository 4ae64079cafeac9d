"""One step's work, as the scheduler chooses it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from makeready.engine.sequence import TokenSequence

if TYPE_CHECKING:
    from makeready.engine.steps.base import StepKind


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start : start + count`` of a sequence's known ones; ``last`` if none is left behind them.

    ``kind`` is the one kind of step that may run them; None if others may.
    """

    sequence: TokenSequence
    start: int
    count: int
    last: bool
    kind: StepKind | None = None


def asked_kind(chunks: list[Chunk]) -> StepKind | None:
    """The kind of step that has to run these chunks; None where others may."""
    return next((chunk.kind for chunk in chunks if chunk.kind is not None), None)


@dataclass(frozen=True)
class Batch:
    """One step's work: generating rows, which run the token that was sampled for them last, then chunks.

    Attributes:
        decoding: the generating sequences, of ``slots``.
        chunks: rows of prompts, and of what has to be computed again.
        admitted: sequences whose first step this is; they have their first chunk in it.
        retractions: sequences that were sent back to wait for it.
        kind: of the step that runs it.
    """

    decoding: list[TokenSequence]
    slots: np.ndarray
    chunks: list[Chunk]
    admitted: list[TokenSequence]
    retractions: int
    kind: StepKind

    @property
    def rows(self) -> int:
        """Rows of the step."""
        return len(self.decoding) + len(self.chunks)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of chunks."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, as many drafts among them as the step has room for."""
        return len(self.decoding) * self.kind.each + self.chunk_tokens

    @property
    def sampled(self) -> list[TokenSequence]:
        """Sequences for which a token is sampled."""
        return self.decoding + [chunk.sequence for chunk in self.chunks if chunk.last]

    def of_rows(self, tokens: list[int]) -> Iterable[tuple[TokenSequence, int]]:
        """Each row's sequence and the token that was sampled for it; behind chunks with others none is.

        Args:
            tokens: of each row, in order, and of padding rows.
        """
        if not self.chunks:
            return zip(self.decoding, tokens, strict=False)
        ends = tokens[len(self.decoding) : self.rows]
        sampled = ((c.sequence, token) for c, token in zip(self.chunks, ends, strict=True) if c.last)
        return chain(zip(self.decoding, tokens, strict=False), sampled)
