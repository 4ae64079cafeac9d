"""Random sequences on the fake executable, held to what each gives by itself.

Everything is small (pages, rows, steps, the alphabet of prompts), so that prefixes are shared, pages run out
and cached ones are evicted all the time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from burst import MOST, BurstExecutable
from drafting import DraftingExecutable
from fake_executable import VOCABULARY, FakeExecutable, alone, buckets_of, scores

from makeready.engine.loop import Engine
from makeready.engine.options import DFS_WEIGHT, LPM, POLICIES, SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ABORT, LENGTH, STOP, TokenSequence
from makeready.engine.step_record import StepRecord
from makeready.graphs.plan.spec import CacheGroup, CacheSpec, Limits


class Cut(Reply):
    """A reply whose text ends behind the first token of a list, wherever a step's tokens end."""

    words: frozenset[int] = frozenset()

    @property
    def follows(self) -> bool:
        return True

    def read(self) -> int:
        """Tokens behind the end, which the sequence has lost again."""
        output = self.sequence.output
        for at, token in enumerate(output, start=1):
            if token in self.words:
                lost = len(output) - at
                self.sequence.finish(STOP, at)
                return lost
        return 0


PATIENCE = 3000  # steps that a drained engine may take: far above what any of these loads needs


def random_limits(rng: random.Random) -> Limits:
    """A few rows, and steps that may be smaller than a prompt."""
    rows = rng.randint(1, 5)
    context = rng.randint(16, 48)
    tokens = rng.randint(rows, 20)
    return Limits(rows, tokens, context, rng.choice([1, 2, 3, 4, 8]))


def random_options(rng: random.Random) -> dict[str, Any]:
    """Any options that go together."""
    policy = rng.choice(POLICIES)
    ratio = rng.choice([0.0, 0.2, 0.7, 1.0])
    return {
        "policy": policy,
        "max_wait": rng.choice([0, 1, 5, 256]),
        "preemption_threshold": rng.randint(1, 3),
        "overlap": rng.random() < 0.8,
        "chunked_prefill_size": rng.choice([None, None, 1]),
        "decode_interval": rng.choice([0, 0, 1, 3]),
        "max_running_requests": rng.choice([None, None, 1]),
        "prefix_cache": policy in (LPM, DFS_WEIGHT) or rng.random() < 0.8,
        "eviction": rng.choice(["lru", "lfu", "fifo", "priority"]),
        "new_token_ratio": ratio,
        "min_new_token_ratio": rng.choice([0.0, ratio]),
    }


def random_cache(
    rng: random.Random, limits: Limits, pages: int, gain: int, shares: bool, states: bool = True
) -> tuple[CacheSpec, dict[str, int]]:
    """Any groups, and how many blocks of each: for one row at least, mostly for fewer than there may be."""
    size, rows = limits.page_size, limits.max_rows
    groups, blocks = [], {}
    names = ["kv", "kv2", "near", "far", *(["state", "state2"] if states else [])]
    for name in rng.sample(names, rng.randint(1, 4)):
        if name.startswith("kv"):
            groups.append(CacheGroup(name, (), size))
            blocks[name] = pages + rng.randint(0, 2)
        elif name.startswith("state"):
            groups.append(CacheGroup(name, (), None))
            least = 2 if shares else 1
            blocks[name] = 1 + rng.randint(least, least * rows + 3)
        else:
            group = CacheGroup(name, (), size, window=rng.randint(2, 9 if name == "near" else 30))
            groups.append(group)
            least = min(limits.pages_per_row, group.tail + 2 + (2 * gain - 3) // size)
            blocks[name] = 1 + rng.randint(least, least * rows + 3)
    return CacheSpec(size, tuple(groups)), blocks


@dataclass
class Simulation:
    """An engine under random events; ``events`` counts submissions, aborts, steps and tokens.

    With ``bursts`` the device decides how many tokens a step gives; None leaves that to chance. With ``drafts`` it
    guesses up to so many, and verifies them. With ``groups`` the cache has any groups of pages, windows and states,
    else one that keeps everything.
    """

    rng: random.Random
    options: dict[str, Any] = field(default_factory=dict)
    bursts: bool | None = None
    drafts: int = 0
    groups: bool = False
    events: int = 0
    retractions: int = 0
    cached: int = 0
    live: dict[TokenSequence, list[int]] = field(default_factory=dict)
    replies: dict[TokenSequence, Reply] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = self.rng
        self.limits = limits = random_limits(rng)
        if self.drafts:
            self.bursts, least = False, 1 + self.drafts
            tokens = max(limits.max_tokens, least)
            self.limits = limits = replace(limits, max_tokens=tokens, max_gain=least)
        pages = 1 + rng.randint(limits.pages_per_row, 2 * limits.pages_per_row + 1)
        rows, tokens = limits.max_rows, limits.max_tokens
        self.scoring = rng.choice([0, rows, rng.randint(rows, tokens)])
        buckets = buckets_of(limits, self.scoring)
        asynchronous = rng.random() < 0.9
        if self.bursts is None:
            self.bursts = rng.random() < 0.3
        options = {**random_options(rng), **self.options}
        cache, blocks = None, None
        if self.groups:
            gain = MOST if self.bursts else limits.max_gain
            cache, blocks = random_cache(
                rng, limits, pages, gain, options["prefix_cache"], states=not self.drafts
            )
            pages = blocks[cache.groups[0].name]
        if self.bursts:
            self.executable = BurstExecutable(
                limits, buckets, pages, asynchronous, rng.randrange(99), cache, blocks
            )
        elif self.drafts:
            self.executable = DraftingExecutable(
                limits, buckets, pages, asynchronous, rng.randrange(99), cache, blocks
            )
        else:
            self.executable = FakeExecutable(limits, buckets, pages, asynchronous, cache, blocks)
        self.engine = Engine(self.executable, SchedulerOptions(**options))
        self.engine.observer = self._observe
        # Conversations that prompts are beginnings of, plus some tokens.
        self.stems = [[rng.randrange(VOCABULARY) for _ in range(limits.context_len)] for _ in range(3)]
        self.ends = frozenset(rng.sample(range(VOCABULARY), rng.choice([0, 0, 1, 5])))

    def submit(self) -> TokenSequence:
        """A sequence that often begins like others, or goes on where another ended."""
        rng, most = self.rng, self.limits.context_len - 1
        stem = rng.choice(self.stems)
        prompt = [
            *stem[: rng.randint(0, rng.choice([most // 4, most // 2, most]))],
            *(rng.randrange(3) for _ in range(rng.choice([0, 0, 1, 4]))),
        ]
        prompt = prompt[:most] or [0]
        scored = self.scoring and rng.random() < 0.3
        most = min(self.limits.context_len - len(prompt), rng.choice([1, 6, 48, 48]))
        count = rng.randint(0 if scored else 1, most)
        params = SamplingParams(
            max_new_tokens=count,
            presence_penalty=rng.choice([0.0, 1.0]),
            ignore_eos=not self.ends,
            return_logprob=bool(scored),
            logprob_start_len=rng.randrange(len(prompt)) if scored else -1,
        )
        sequence = TokenSequence(
            prompt,
            params,
            rng.randrange(3),
            self.ends,
            salt=rng.choice(["", "", "other"]),
            priority=rng.randrange(6),
        )
        ends = self.ends
        if scored or rng.random() < 0.5:  # the others run without a reply
            cut = Cut(sequence)
            cut.words = frozenset(rng.sample(range(VOCABULARY), rng.choice([0, 5])))
            self.replies[sequence], ends = cut, ends | cut.words
        self.engine.submit(sequence, self.replies.get(sequence))
        self.live[sequence] = alone(prompt, sequence.seed, count, ends)
        self.events += 1
        return sequence

    def abort(self) -> None:
        """End any sequence, wherever it is."""
        if self.live:
            sequence = self.rng.choice(list(self.live))
            self.engine.abort(sequence)
            assert sequence.finish_reason == ABORT
            self._final(sequence)
            self.events += 1
            self._check()

    def step(self) -> None:
        """One step of the engine, and all that must hold behind it."""
        for sequence in self.engine.step():
            assert sequence.finish_reason != ABORT
            self._final(sequence)
        self.events += 1
        self._check()

    def run(self, steps: int) -> None:
        """Random events, then all that is left to the end."""
        pace = self.rng.choice([0.1, 0.5, 1.5])
        for _ in range(steps):
            while self.rng.random() < pace / (1 + pace) and len(self.live) < 30:
                self.submit()
            if self.rng.random() < 0.05:
                self.abort()
            if self.rng.random() < 0.05 and self.live:  # a turn that goes on with an answer
                self.stems[self.rng.randrange(3)] = self._continued(self.rng.choice(list(self.live)))
            self.step()
        self.drain()

    def drain(self) -> None:
        """Every sequence that is still there gets done."""
        for _ in range(PATIENCE):
            if not self.engine.busy:
                break
            self.step()
        assert not self.live, "somebody starves"
        assert not self.engine.busy
        assert all(pool.held == 0 for pool in self.engine.pools.by_name.values())

    def _continued(self, sequence: TokenSequence) -> list[int]:
        stem = [*sequence.prompt, *sequence.output]
        return [*stem, *(self.rng.randrange(VOCABULARY) for _ in range(self.limits.context_len - len(stem)))]

    def _final(self, sequence: TokenSequence) -> None:
        expected, reply = self.live.pop(sequence), self.replies.pop(sequence, None)
        assert reply is None or reply.done
        self.events += len(sequence.output)
        assert sequence.output == expected[: len(sequence.output)]
        first = sequence.sampling.logprob_start_len
        scored = [] if reply is None else [(t.token_id, t.logprob) for t in reply.input_logprobs]
        wanted = scores(sequence.prompt, first) if first >= 0 else []
        ends = self.ends | (reply.words if isinstance(reply, Cut) else frozenset())
        assert scored == wanted[: len(scored)]
        if sequence.finish_reason != ABORT:
            assert scored == wanted
            assert sequence.output == expected
            assert sequence.finish_reason == (STOP if expected and expected[-1] in ends else LENGTH)
        assert sequence.cached_tokens < len(sequence.prompt)
        assert sequence.cached_tokens % self.limits.page_size == 0

    def _check(self) -> None:
        scheduler = self.engine.scheduler
        self.engine.pools.check()
        for name, memory in (*self.executable.paged.items(), *self.executable.states.items()):
            memory.scribble(self.engine.pools.by_name[name]._free)
        if scheduler.cache is not None:
            scheduler.cache.check()
        assert set(scheduler.waiting) | set(scheduler.running) == set(self.live)
        assert len(scheduler.waiting) + len(scheduler.running) == len(self.live)
        arrival = [sequence.ticket for sequence in scheduler.waiting]
        assert arrival == sorted(arrival)

    def _observe(self, record: StepRecord) -> None:
        self.retractions += record.retractions
        self.cached += record.cached_tokens
        bucket, rows, tokens = self.executable.steps[-1]
        assert record.free + record.cached + record.held == self.engine.pool.usable
        assert record.plan_start <= record.launch_start <= record.launch_end <= record.wait_start
        assert record.wait_start <= record.results_read <= record.commit_end
        assert record.rows <= record.bucket.rows
        assert record.prompt_tokens <= record.tokens <= record.bucket.tokens
        if not self.engine._flights:
            assert (record.bucket, record.rows, record.tokens) == (bucket, rows, tokens)
