"""Steps that report log-probabilities of their input, for prompts that ask for them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from makeready.engine.batch import Batch
from makeready.engine.request import Request
from makeready.engine.seats import Seats
from makeready.engine.steps.base import Sampled, step_kind
from makeready.engine.steps.generate import sampled_tokens, stage_sequences, token_logprob
from makeready.graphs.plan.spec import INPUT_LOGPROBS

if TYPE_CHECKING:
    from makeready.engine.staging import Stage

_REPORTED = ("target_logprob", "target_top_ids", "target_top_values")


@dataclass(frozen=True)
class InputLogprobs:
    """A step that generates, and tells of chunks how probable their tokens were."""

    name: str = INPUT_LOGPROBS
    order: int = 1
    least: int = 1
    most: int = 1

    def takes(self, batch: Batch) -> bool:
        return any(chunk.scores for chunk in batch.chunks)

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        begins = stage_sequences(batch, seats, stage)
        ids, slots = np.zeros(batch.tokens, np.int64), np.full(batch.tokens, stage.null_slot)
        for chunk, begin in zip(batch.chunks, begins[len(batch.decoding) :].tolist(), strict=True):
            first, end = chunk.start + 1, begin + chunk.scores
            ids[begin:end] = chunk.request.ids()[first : first + chunk.scores]
            slots[begin:end] = chunk.request.slot
        stage.write("target_ids", ids)
        stage.write("target_slot", slots)

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray | None:
        return None

    def commit(
        self, batch: Batch, results: Mapping[str, np.ndarray], void: Collection[Request]
    ) -> Iterator[Sampled]:
        begin = len(batch.decoding)
        for chunk in batch.chunks:
            request = chunk.request
            for i in range(0 if request.done or request in void else chunk.scores):
                at = chunk.start + 1 + i
                of = (results[name][begin + i] for name in _REPORTED)
                found = token_logprob(request, request.prompt[at], of)
                if math.isnan(found.logprob or 0.0):
                    yield request, f"the logits of prompt token {at}", None
                    break
                request.input_logprobs.append(found)
            begin += chunk.count
        yield from sampled_tokens(batch, results)


step_kind(InputLogprobs())
