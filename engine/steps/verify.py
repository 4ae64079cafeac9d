"""Steps that check guesses: generating rows run their last token and drafts behind it.

What they gain is known on the device alone until results are read. They take no chunks: while prompts are
computed, rows beside them generate token by token.

Such a step takes longer than one that decodes, by what the plan predicts, and brings more tokens where drafts are
right. Whether it pays is seen in what the rows' last ones brought; where it does not, one of many steps tries again.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
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

# Of the mean of what steps brought, the share of the last one: of a sequence, and of all, where new ones begin.
LATELY, USUALLY = 1 / 8, 1 / 64
# Predictions know nothing of what is around a step: SmolLM2's, of 5 tokens on a CPU, took 1.45 times as long as its
# decode step where 1.09 was predicted.
CAUTION = 4 / 3
RETRY = 32  # steps that decode before one of those that do not pay tries again
_OUTPUT = ("logprob", "top_ids", "top_values")


@dataclass
class Verify:
    """A step that samples behind each token of its rows, and tells how many drafts were right.

    Attributes:
        most, each: tokens that a row gains, and runs, at most. Nodes of a tree take as many places, so that the host
            counts each as gained until it learns.
        rows: of the largest such step.
        masked: whether places behind drafts have masks, so that rows that follow a grammar may have drafts.
        always: whether it is taken where it does not pay.
        ratios: see :class:`~makeready.graphs.plan.spec.StepSpec`.
        usual: tokens that a row's step brought, on average.
    """

    name: str = VERIFY
    order: int = -1
    least: int = 1
    most: int = 1
    each: int = 1
    reads_history: bool = True
    forces: bool = True
    rows: int = 0
    masked: bool = True
    always: bool = False
    ratios: Mapping[int, float] = field(default_factory=dict)
    usual: float = 0.0
    _passed: int = 0  # steps that decoded since it was last tried

    def of(self, step: StepSpec, *, always: bool = False) -> Verify:
        assert step.each is not None
        # Half of the first drafts are taken to be right.
        usual = 1 + ((step.gain or step.each) - 1) / 2
        return Verify(
            most=step.each, each=step.each, rows=step.rows, masked=bool(step.early), always=always,
            ratios=step.ratios, usual=usual,
        )  # fmt: skip

    def claims(self, sequence: TokenSequence) -> int | None:
        return None

    def launched(self, chunk: Chunk) -> None: ...

    def takes(self, decoding: list[TokenSequence], chunks: list[Chunk]) -> bool:
        if chunks or not 0 < len(decoding) <= self.rows:
            return False
        if not self.masked and any(sequence.constraint is not None for sequence in decoding):
            return False  # places of a tree have no masks
        if not self.always and not self._pays(decoding) and self._passed < RETRY:
            self._passed += 1
            return False
        self._passed = 0
        return True

    def _pays(self, decoding: list[TokenSequence]) -> bool:
        """Whether the rows should gain more by it than by the decode steps that would take as long.

        Where the plan predicts nothing, they always should.
        """
        sizes = sorted(self.ratios)
        if not sizes:
            return True
        expected = sum(map(self._expected, decoding)) / len(decoding)
        return expected > CAUTION * self.ratios[sizes[bisect_left(sizes, len(decoding))]]

    def _expected(self, sequence: TokenSequence) -> float:
        return self.usual if sequence.gain is None else sequence.gain

    def learned(self, decoding: list[TokenSequence], counts: np.ndarray) -> None:
        for sequence, count in zip(decoding, counts.tolist(), strict=True):
            before = self._expected(sequence)
            sequence.gain = before + LATELY * (count - before)
            self.usual += USUALLY * (count - self.usual)

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        stage_sequences(batch, seats, stage, np.full(len(batch.decoding), self.most))
        stage.write("limit", seats.limit_S[batch.slots])

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray:
        return results["accepted"][: batch.rows].astype(np.int64) + 1

    def drafts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Drafts:
        return Drafts(*(results[name][: batch.rows].tolist() for name in ("drafted", "accepted")))

    def guesses(self, batch: Batch, early: Mapping[str, np.ndarray]) -> list[list[int]] | None:
        ids, counts = early["draft_ids"].tolist(), early["draft_len"][: batch.rows].tolist()
        ends = itertools.accumulate(counts)
        return [ids[end - count + 1 : end] for end, count in zip(ends, counts, strict=True)]

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
