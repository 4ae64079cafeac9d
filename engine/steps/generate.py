"""Steps that generate: ``decode`` where every row runs one token, ``extend`` where rows differ in length."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from makeready.engine.batch import Batch
from makeready.engine.request import Request, TokenLogprob
from makeready.engine.seats import Seats
from makeready.engine.steps.base import Sampled, step_kind
from makeready.graphs.plan.spec import DECODE, EXTEND

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

    def takes(self, batch: Batch) -> bool:
        if any(chunk.scores for chunk in batch.chunks):
            return False
        return self.name == EXTEND or all(chunk.last and chunk.count == 1 for chunk in batch.chunks)

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        stage_sequences(batch, seats, stage)

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray | None:
        return None

    def commit(
        self, batch: Batch, results: Mapping[str, np.ndarray], void: Collection[Request]
    ) -> Iterator[Sampled]:
        return sampled_tokens(batch, results)


def stage_sequences(batch: Batch, seats: Seats, stage: Stage) -> np.ndarray:
    """Write the fields of ``graphs.steps.generate.sequence_fields``; returns where each row's tokens begin.

    Generating rows run what the device sampled for them, behind as many tokens as the device has.
    """
    rows, chunks = len(batch.decoding), batch.chunks
    slots, samples = batch.slots, batch.slots
    ids, starts, counts = np.full(rows, DEVICE), np.full(rows, DEVICE), np.ones(rows, np.int64)
    if chunks:
        own = [chunk.request.slot for chunk in chunks]
        # What is sampled behind a chunk that is not the last is nobody's: it is left to the null slot.
        last = [s if chunk.last else stage.null_slot for s, chunk in zip(own, chunks, strict=True)]
        slots, samples = np.append(slots, own), np.append(slots, last)
        starts = np.append(starts, [chunk.start for chunk in chunks])
        counts = np.append(counts, [chunk.count for chunk in chunks])
        own_ids = (c.request.ids()[c.start : c.start + c.count] for c in chunks)
        ids = np.concatenate((ids, *own_ids))
    begins = np.cumsum(counts) - counts
    stage.write("token_ids", ids)
    stage.write("row_slot", slots)
    stage.write("row_start", starts)
    stage.write("query_start", begins)
    stage.write("query_len", counts)
    stage.write("sample_slot", samples)
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
    return begins


def sampled_tokens(batch: Batch, results: Mapping[str, np.ndarray]) -> Iterator[Sampled]:
    """The token of each row that samples for somebody."""
    tokens = results["tokens"].tolist()
    for row, request in batch.sampling():
        token, logprob = tokens[row], None
        if token < 0:
            yield request, f"the logits of output token {len(request.output)}", None
            continue
        if request.sampling.return_logprob and request.finish_reason is None:
            logprob = token_logprob(request, token, (results[name][row] for name in _OUTPUT))
        yield request, token, logprob


def token_logprob(request: Request, token: int, results: Iterable[np.ndarray]) -> TokenLogprob:
    """What a step says of ``token``: its log-probability, and ids and log-probabilities of its rivals."""
    logprob, ids, values = results
    count = request.sampling.top_logprobs_num
    pairs = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
    return TokenLogprob(token, float(logprob), tuple((i, value) for i, value in pairs if i >= 0))


step_kind(Generate(DECODE, order=0))
step_kind(Generate(EXTEND, order=2))
