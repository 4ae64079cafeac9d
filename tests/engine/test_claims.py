"""Kinds of step that requests ask for: tokens that one claims run in no other, whatever runs beside them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from fake_executable import FakeExecutable, alone, buckets_of, scores

from makeready.engine.batch import Batch, Chunk
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.steps import base as engine_steps
from makeready.engine.steps.generate import Generate
from makeready.graphs.plan.spec import DECODE, EXTEND, INPUT_LOGPROBS, Bucket, Limits

NAME, ASKED, FIRST, TOKENS = "toy_claimed", 7, 2, 5


@dataclass(frozen=True)
class Claimed(Generate):
    """Claims all known tokens but the first two of sequences with a certain priority."""

    name: str = NAME
    order: int = 1

    def claims(self, sequence: TokenSequence) -> int | None:
        return FIRST if sequence.priority == ASKED and sequence.length > FIRST else None

    def takes(self, decoding: list[TokenSequence], chunks: list[Chunk]) -> bool:
        return False


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_steps.step_kinds({})  # what registers itself has done so
    monkeypatch.setattr(engine_steps, "_KINDS", dict(engine_steps._KINDS))
    engine_steps.step_kind(Claimed())


def executable_of(limits: Limits, pages: int) -> FakeExecutable:
    """A plan with steps of that kind, of a few tokens."""
    buckets = [*buckets_of(limits, logprob_tokens=4), Bucket(NAME, limits.max_rows, TOKENS)]
    made = FakeExecutable(limits, sorted(buckets), pages)
    extend = made.plan.steps[EXTEND]
    made.plan.steps = made.plan.steps | {NAME: replace(extend, tokens=TOKENS)}
    return made


def run_in(batch: Batch, chunk: Chunk) -> str | None:
    """The kind of step that a chunk's tokens are claimed by."""
    sequence, end = chunk.sequence, chunk.start + chunk.count
    if sequence.priority == ASKED and end > FIRST:
        assert chunk.start >= FIRST, "a chunk begins before the claim and ends in it"
        return NAME
    return None


@pytest.mark.parametrize("seed", range(12))
def test_claimed_tokens_run_in_their_own_kind_of_step(
    seed: int, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few pages, so that sequences are computed again; and another kind with claims of its own."""
    rng = random.Random(seed)
    limits = Limits(max_rows=4, max_tokens=12, context_len=32, page_size=4)
    engine = Engine(executable_of(limits, pages=14), SchedulerOptions(prefix_cache=rng.random() < 0.5))
    ran: list[str] = []
    launched = engine.scheduler.launched

    def observed(batch: Batch) -> None:
        for chunk in batch.chunks:
            claimed = run_in(batch, chunk)
            assert claimed in (None, batch.kind.name)
            assert claimed is None or batch.tokens <= TOKENS
        assert batch.kind.name != NAME or any(run_in(batch, chunk) for chunk in batch.chunks)
        ran.append(batch.kind.name)
        launched(batch)

    monkeypatch.setattr(engine.scheduler, "launched", observed)
    replies: list[Reply] = []
    for i in range(30):
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 14))]
        scored: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0} if i % 3 == 1 else {}
        params = SamplingParams(max_new_tokens=rng.randint(1, 15), **scored)
        priority = ASKED if i % 3 == 0 else 0
        replies.append(Reply(TokenSequence(prompt, params, i, frozenset(), priority=priority)))
        engine.submit(replies[-1].sequence, replies[-1])
    for _ in range(3000):
        if not engine.busy:
            break
        engine.step()
    for reply in replies:
        sequence = reply.sequence
        assert sequence.output == alone(sequence.prompt, sequence.seed, sequence.most, frozenset())
        if sequence.sampling.return_logprob:
            found = [(token.token_id, token.logprob) for token in reply.input_logprobs]
            assert found == scores(sequence.prompt, 0)
    assert {NAME, INPUT_LOGPROBS, DECODE} <= set(ran)
