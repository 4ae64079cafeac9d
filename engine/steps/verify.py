"""Steps that check guesses: generating rows run their last token and drafts behind it.

What they gain is known on the device alone until results are read. They take no chunks: while prompts are
computed, rows beside them generate token by token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from makeready.engine.batch import Batch, Chunk
from makeready.engine.seats import Seats
from makeready.engine.sequence import TokenSequence
from makeready.engine.steps.base import Drafts, Report, step_kind
from makeready.engine.steps.generate import stage_sequences, token_logprob
from makeready.graphs.plan.spec import VERIFY, StepSpec

if TYPE_CHECKING:
    from makeready.engine.staging import Stage

_OUTPUT = ("logprob", "top_ids", "top_values")


@dataclass(frozen=True)
class Verify:
    """A step that samples behind each token of its rows, and tells how many drafts were right.

    Attributes:
        most: tokens that a row runs, and gains, at most.
        rows: of the largest such step.
    """

    name: str = VERIFY
    order: int = -1
    least: int = 1
    most: int = 1
    rows: int = 0

    @property
    def each(self) -> int:
        return self.most

    @property
    def reads_history(self) -> bool:
        return True

    def of(self, step: StepSpec) -> Verify:
        assert step.each is not None
        return replace(self, most=step.each, rows=step.rows)

    def claims(self, sequence: TokenSequence) -> int | None:
        return None

    def launched(self, chunk: Chunk) -> None: ...

    def takes(self, decoding: list[TokenSequence], chunks: list[Chunk]) -> bool:
        return not chunks and len(decoding) <= self.rows

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        # A mask is of one place: behind the last token, not behind drafts.
        runs = np.array([1 if s.constraint is not None else self.most for s in batch.decoding], np.int64)
        stage_sequences(batch, seats, stage, runs)
        stage.write("limit", seats.limit_S[batch.slots])

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray:
        return results["accepted"][: batch.rows].astype(np.int64) + 1

    def drafts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Drafts:
        return Drafts(*(results[name][: batch.rows].tolist() for name in ("drafted", "accepted")))

    def tokens(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Iterator[tuple[TokenSequence, int]]:
        tokens = results["tokens"].tolist()
        for sequence, first, stop in self._sampled(batch, results):
            for token in tokens[first:stop]:
                yield sequence, token

    def reports(
        self, batch: Batch, results: Mapping[str, np.ndarray], wanted: Collection[TokenSequence]
    ) -> Iterator[Report]:
        tokens = results["tokens"].tolist()
        for sequence, first, stop in self._sampled(batch, results):
            for at in range(first, stop if sequence in wanted else first):
                if tokens[at] >= 0:
                    of = (results[name][at] for name in _OUTPUT)
                    place = sequence.length + at - first
                    yield Report(sequence, place, token_logprob(sequence, tokens[at], of))

    def _sampled(
        self, batch: Batch, results: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[TokenSequence, int, int]]:
        """Where the tokens lie that each row gains: rows are packed, each with its token and its drafts."""
        drafted, accepted = self.drafts(batch, results)
        first = 0
        for sequence, guesses, right in zip(batch.decoding, drafted, accepted, strict=True):
            yield sequence, first, first + 1 + right
            first += 1 + guesses


step_kind(Verify())
