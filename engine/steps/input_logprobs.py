"""Steps that report log-probabilities of their input, for prompts that ask for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from makeready.engine.batch import Batch, Chunk
from makeready.engine.seats import Seats
from makeready.engine.sequence import TokenSequence
from makeready.engine.steps.base import Drafts, Report, step_kind
from makeready.engine.steps.generate import output_reports, stage_sequences, token_logprob
from makeready.graphs.plan.spec import INPUT_LOGPROBS, StepSpec

if TYPE_CHECKING:
    from makeready.engine.staging import Stage

_REPORTED = ("target_logprob", "target_top_ids", "target_top_values")


@dataclass(frozen=True)
class InputLogprobs:
    """A step that generates, and tells of chunks how probable the tokens behind theirs were."""

    name: str = INPUT_LOGPROBS
    order: int = 1
    least: int = 1
    most: int = 1
    each: int = 1
    reads_history: bool = False
    forces: bool = True

    def of(self, step: StepSpec, *, always: bool = False) -> InputLogprobs:
        return self

    def claims(self, sequence: TokenSequence) -> int | None:
        return sequence.scored - 1 if sequence.scoring else None

    def launched(self, chunk: Chunk) -> None:
        chunk.sequence.scored += _scored(chunk)

    def takes(self, decoding: list[TokenSequence], chunks: list[Chunk]) -> bool:
        return False  # it runs what it claims, no more

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        stage_sequences(batch, seats, stage)
        ids, slots = np.zeros(batch.tokens, np.int64), np.full(batch.tokens, stage.null_slot)
        begin = len(batch.decoding)
        for chunk in batch.chunks:
            count, first = _scored(chunk), chunk.start + 1
            ids[begin : begin + count] = chunk.sequence.ids()[first : first + count]
            slots[begin : begin + count] = chunk.sequence.slot
            begin += chunk.count
        stage.write("target_ids", ids)
        stage.write("target_slot", slots)

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray | None:
        return None

    def learned(self, decoding: list[TokenSequence], counts: np.ndarray) -> None: ...

    def drafts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Drafts | None:
        return None

    def guesses(self, batch: Batch, early: Mapping[str, np.ndarray]) -> list[list[int]] | None:
        return None

    def tokens(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Iterable[tuple[TokenSequence, int]]:
        return batch.of_rows(results["tokens"].tolist())

    def reports(
        self, batch: Batch, results: Mapping[str, np.ndarray], wanted: Collection[TokenSequence]
    ) -> Iterator[Report]:
        begin = len(batch.decoding)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            for i in range(_scored(chunk) if sequence in wanted else 0):
                at = chunk.start + 1 + i
                of = (results[name][begin + i] for name in _REPORTED)
                yield Report(sequence, at, token_logprob(sequence, sequence.prompt[at], of))
            begin += chunk.count
        yield from output_reports(batch, results, wanted)


def _scored(chunk: Chunk) -> int:
    """How many of the tokens behind a chunk's are of the prompt: those whose log-probabilities are wanted."""
    if chunk.kind is None:
        return 0
    return min(chunk.count, len(chunk.sequence.prompt) - 1 - chunk.start)


step_kind(InputLogprobs())
