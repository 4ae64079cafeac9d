"""A kind of step that only tests know: it runs generating rows on and on, by as many tokens as the device likes.

The host learns how many when it reads the results, a step late. It is registered from here, as any kind is.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fake_executable import FakeExecutable, Step

from makeready.engine.batch import Batch, Chunk
from makeready.engine.seats import Seats
from makeready.engine.sequence import TokenSequence
from makeready.engine.staging import Stage
from makeready.engine.steps.base import Drafts, Report, step_kind
from makeready.engine.steps.generate import stage_sequences
from makeready.graphs.plan.spec import DECODE, Bucket, CacheSpec, Limits, StepSpec, fields
from makeready.kernels.spec import ROWS

BURST, MOST = "burst", 4


@dataclass(frozen=True)
class Burst:
    """Up to :data:`MOST` tokens a row."""

    name: str = BURST
    order: int = -1
    least: int = 1
    most: int = MOST
    each: int = 1
    reads_history: bool = False
    forces: bool = False

    def of(self, step: StepSpec, *, always: bool = False) -> Burst:
        return self

    def claims(self, sequence: TokenSequence) -> int | None:
        return None

    def launched(self, chunk: Chunk) -> None: ...

    def takes(self, decoding: list[TokenSequence], chunks: list[Chunk]) -> bool:
        return not chunks

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        stage_sequences(batch, seats, stage)
        stage.write("limit", seats.limit_S[batch.slots])

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray:
        return results["count"][: len(batch.decoding)].astype(np.int64)

    def learned(self, decoding: list[TokenSequence], counts: np.ndarray) -> None: ...

    def drafts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Drafts | None:
        return None

    def guesses(self, batch: Batch, early: Mapping[str, np.ndarray]) -> list[list[int]] | None:
        return None

    def tokens(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Iterator[tuple[TokenSequence, int]]:
        for row, sequence in enumerate(batch.decoding):
            for token in results["tokens"][row, : results["count"][row]].tolist():
                yield sequence, token

    def reports(
        self, batch: Batch, results: Mapping[str, np.ndarray], wanted: Collection[TokenSequence]
    ) -> Iterator[Report]:
        return iter(())


step_kind(Burst())


def with_bursts(steps: Mapping[str, StepSpec], limits: Limits) -> dict[str, StepSpec]:
    """The kinds of a plan and this one; rows may gain as many pages as it takes in any step."""
    width = -(-MOST // limits.page_size)
    wider = {}
    for kind, step in steps.items():
        staged = tuple(
            replace(f, spec=replace(f.spec, shape=(ROWS, width))) if f.name.startswith("grow_page") else f
            for f in step.staged
        )
        wider[kind] = replace(step, staged=staged)
    decode = wider[DECODE]
    staged = decode.staged + fields(("limit", (ROWS,), "int32", 0))
    results = fields(("tokens", (ROWS, MOST), "int32", -1), ("count", (ROWS,), "int32", 0))
    return wider | {BURST: StepSpec(limits.max_rows, limits.max_rows, 1, staged, results)}


class BurstExecutable(FakeExecutable):
    """A device that decides by itself how far a row gets."""

    def __init__(
        self,
        limits: Limits,
        buckets: Sequence[Bucket],
        pages: int,
        asynchronous: bool,
        seed: int,
        cache: CacheSpec | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        bursts = {Bucket(BURST, rows, rows) for rows in (1, limits.max_rows)}
        super().__init__(limits, sorted({*buckets, *bursts}), pages, asynchronous, cache, blocks)
        self.plan.steps = with_bursts(self.plan.steps, limits)
        self._random = random.Random(seed)

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> Step:
        if bucket.phase != BURST:
            return super().launch(bucket, step, cut=cut)
        kind = self.plan.steps[BURST]
        assert set(step) == {field.name for field in kind.staged}
        rows = int((step["query_len"] > 0).sum())
        self._check_padding(bucket, step, rows, rows)
        results: dict[str, Any] = {
            f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in kind.results
        }
        self._begin(step, rows)
        for row in range(rows):
            slot, limit = int(step["row_slot"][row]), int(step["limit"][row])
            assert step["row_start"][row] == -1, "the host says a length that only the device knows"
            for n in range(self._random.randint(1, MOST)):
                at = int(self._length[slot])
                if at >= limit - 1:  # the last token is sampled but never run
                    break
                (folded,) = self._run(slot, np.array([at]), self._history[slot, [at]])
                self._read_row(slot, at)
                results["tokens"][row, n] = self._sample(slot, folded)
                results["count"][row] = n + 1
        self._end()
        self.steps.append((bucket, rows, rows))
        return Step(results)
