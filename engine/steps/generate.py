"""Steps that generate: ``decode`` where every row runs one token, ``extend`` where rows differ in length."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from makeready.engine.batch import Batch, Chunk
from makeready.engine.output import TokenLogprob
from makeready.engine.seats import Seats
from makeready.engine.sequence import TokenSequence
from makeready.engine.steps.base import Drafts, Report, step_kind
from makeready.graphs.plan.spec import DECODE, EXTEND, StepSpec

if TYPE_CHECKING:
    from makeready.engine.staging import Stage

DEVICE = -1  # as a token id: what the device sampled last; as a start: the length that the device has
_OUTPUT = ("logprob", "top_ids", "top_values")


@dataclass(frozen=True)
class Generate:
    """A step that puts known tokens behind their sequences and samples one token a row."""

    name: str
    order: int
    least: int = 1
    most: int = 1
    each: int = 1
    reads_history: bool = False
    forces: bool = True

    def of(self, step: StepSpec, *, always: bool = False) -> Generate:
        return self

    def claims(self, sequence: TokenSequence) -> int | None:
        return None

    def launched(self, chunk: Chunk) -> None: ...

    def takes(self, decoding: list[TokenSequence], chunks: list[Chunk]) -> bool:
        return self.name == EXTEND or all(chunk.last and chunk.count == 1 for chunk in chunks)

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        stage_sequences(batch, seats, stage)

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
        return output_reports(batch, results, wanted)


def stage_sequences(batch: Batch, seats: Seats, stage: Stage, runs: np.ndarray | None = None) -> None:
    """Write the fields of ``graphs.steps.generate.sequence_fields``.

    Generating rows run what the device sampled for them, behind as many tokens as the device has.

    Args:
        runs: tokens of each generating row; None where each runs one.
    """
    slots = batch.slots
    # While the same rows generate, all that is said of them here stays as it is.
    if batch.chunks or runs is not None or slots is not stage.generating:
        slots = _stage_rows(batch, stage, runs)
        stage.generating = None if batch.chunks or runs is not None else slots
    if grows := seats.pools.grows:
        grown = seats.news(slots, stage.width(grows[0]))
        if grown is None:
            stage.clear("grow_at", *grows)
        else:
            stage.write("grow_at", grown[0])
            for name, pages in zip(grows, grown[1], strict=True):
                stage.write(name, pages)
    if seats.states:
        for (read, written), states in zip(seats.pools.state_fields, seats.states, strict=True):
            stage.write(read, states.in_S[slots])
            stage.write(written, states.out_S[slots])


def _stage_rows(batch: Batch, stage: Stage, runs: np.ndarray | None) -> np.ndarray:
    """Write which tokens each row runs; returns the rows' slots."""
    rows, chunks = len(batch.decoding), batch.chunks
    slots, samples = batch.slots, batch.slots
    counts = np.ones(rows, np.int64) if runs is None else runs
    ids, starts = np.full(counts.sum(), DEVICE), np.full(rows, DEVICE)
    if chunks:
        own = [chunk.sequence.slot for chunk in chunks]
        # What is sampled behind a chunk that is not the last is nobody's: it is left to the null slot.
        last = [s if chunk.last else stage.null_slot for s, chunk in zip(own, chunks, strict=True)]
        slots, samples = np.append(slots, own), np.append(slots, last)
        starts = np.append(starts, [chunk.start for chunk in chunks])
        counts = np.append(counts, [chunk.count for chunk in chunks])
        own_ids = (c.sequence.ids()[c.start : c.start + c.count] for c in chunks)
        ids = np.concatenate((ids, *own_ids))
    stage.write("token_ids", ids)
    stage.write("row_slot", slots)
    stage.write("row_start", starts)
    stage.write("query_start", np.cumsum(counts) - counts)
    stage.write("query_len", counts)
    stage.write("sample_slot", samples)
    return slots


def output_reports(
    batch: Batch, results: Mapping[str, np.ndarray], wanted: Collection[TokenSequence]
) -> Iterator[Report]:
    """Log-probabilities of the token of each row that samples for somebody who wants them."""
    tokens = results["tokens"].tolist()
    rows = enumerate((*batch.decoding, *(chunk.sequence if chunk.last else None for chunk in batch.chunks)))
    for row, sequence in rows:
        if sequence is not None and sequence in wanted and tokens[row] >= 0:
            of = (results[name][row] for name in _OUTPUT)
            yield Report(sequence, sequence.length, token_logprob(sequence, tokens[row], of))


def token_logprob(sequence: TokenSequence, token: int, results: Iterable[np.ndarray]) -> TokenLogprob:
    """What a step says of ``token``: its log-probability, and ids and log-probabilities of its rivals."""
    logprob, ids, values = results
    count = sequence.sampling.top_logprobs_num
    pairs = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
    return TokenLogprob(token, float(logprob), tuple((i, value) for i, value in pairs if i >= 0))


step_kind(Generate(DECODE, order=0))
step_kind(Generate(EXTEND, order=2))
