"""One step's work, as the scheduler chooses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from makeready.engine.request import Request

if TYPE_CHECKING:
    from makeready.engine.steps.base import StepKind


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start : start + count`` of a request's known ones; ``last`` if none is left behind them.

    ``scores`` tokens of its prompt, from ``start + 1`` on, get their log-probabilities.
    """

    request: Request
    start: int
    count: int
    last: bool
    scores: int = 0


@dataclass(frozen=True)
class Batch:
    """One step's work: generating rows, which run the token that was sampled for them last, then chunks.

    Attributes:
        decoding: the generating requests, of ``slots``.
        chunks: rows of prompts, and of what has to be computed again.
        admitted: requests whose first step this is; they have their first chunk in it.
        retractions: requests that were sent back to wait for it.
        kind: of the step that runs it.
    """

    decoding: Sequence[Request]
    slots: np.ndarray
    chunks: Sequence[Chunk]
    admitted: Sequence[Request]
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
        """Tokens of all rows."""
        return len(self.decoding) + self.chunk_tokens

    def sampling(self) -> Iterator[tuple[int, Request]]:
        """Rows whose sampled token belongs to their request; behind other chunks it means nothing."""
        ends = ((row, c.request) for row, c in enumerate(self.chunks, start=len(self.decoding)) if c.last)
        return chain(enumerate(self.decoding), ends)
