"""An executable that computes nothing but checks what it is given: its next token is a hash of the context.

It keeps what a device keeps of a sequence: its length, its page list, its tokens. What stands in for keys and
values of a token is a hash of it and of all tokens before it, as the real ones depend on all of these. A row's
context is read back through its page list: a token that was written to a wrong page, a page that was given
away too early or never told of, a prefix of another sequence, or a position off by one are found in the very
step that would read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from makeready.graphs.request import Request
from makeready.graphs.spec import DECODE, EXTEND, INPUT_LOGPROBS, Bucket, CacheGroup, CacheSpec, Limits
from makeready.graphs.steps.base import declare

VOCABULARY = 50
_M = 0x9E3779B97F4A7C15  # odd, so that powers of it can be divided by
_MASK = 2**64 - 1


def fold(tokens: Sequence[int]) -> int:
    """A hash of a sequence: of its beginning and its last token."""
    value = 0
    for token in tokens:
        value = (value * _M + token + 1) & _MASK
    return value


def sample(folded: int, seed: int) -> int:
    """The next token of a sequence with this hash."""
    mixed = (folded ^ (seed * 0xBF58476D1CE4E5B9)) & _MASK
    mixed = ((mixed ^ mixed >> 30) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ mixed >> 31) % VOCABULARY


def score(folded: int, token: int) -> float:
    """The log-probability of a token behind a sequence with this hash."""
    return -sample(folded, token + 1) - token / 128  # exact in float32


def scores(prompt: Sequence[int], first: int) -> list[tuple[int, float | None]]:
    """Brute force: tokens of a prompt from ``first`` on, and their log-probabilities."""
    return [(prompt[i], score(fold(prompt[:i]), prompt[i]) if i else None) for i in range(first, len(prompt))]


def alone(prompt: Sequence[int], seed: int, count: int, end_ids: frozenset[int]) -> list[int]:
    """Brute force: the tokens of a request by itself."""
    tokens: list[int] = []
    while len(tokens) < count and not (tokens and tokens[-1] in end_ids):
        tokens.append(sample(fold([*prompt, *tokens]), seed))
    return tokens


def buckets_of(limits: Limits, logprob_tokens: int = 0) -> list[Bucket]:
    """A few of each kind, the largest included."""
    rows, tokens = limits.max_rows, limits.max_tokens
    decode = {Bucket(DECODE, r, r) for r in (1, rows)}
    extend = {Bucket(EXTEND, min(r, t), t) for r in (1, rows) for t in (max(1, tokens // 3), tokens)}
    scoring = {Bucket(INPUT_LOGPROBS, min(rows, t), t) for t in (logprob_tokens // 2, logprob_tokens) if t}
    return sorted(decode | extend | scoring)


class Step:
    """What a launch returns: results of its own, as a real one's."""

    def __init__(self, results: dict[str, np.ndarray]) -> None:
        self._results = results

    def wait(self) -> Mapping[str, np.ndarray]:
        return self._results


class FakeExecutable:
    """See the module's docstring; ``steps`` keeps (bucket, live rows, live tokens) of every launch."""

    def __init__(
        self, limits: Limits, buckets: Sequence[Bucket], pages: int, asynchronous: bool = True
    ) -> None:
        scored = max((b.tokens for b in buckets if b.phase == INPUT_LOGPROBS), default=0)
        kv = CacheSpec(limits.page_size, (CacheGroup("kv", (), limits.page_size),))
        steps, slots = declare(limits, Request(max_logprob_tokens=scored), kv)
        self.plan: Any = SimpleNamespace(
            limits=limits, buckets=tuple(buckets), steps=steps, slots=slots, kv=kv
        )
        self.pages, self.blocks = pages, {"kv": pages}
        self.asynchronous = asynchronous
        self.steps: list[tuple[Bucket, int, int]] = []
        self._tokens = np.full(pages * limits.page_size, -1)
        self._folds = np.zeros(pages * limits.page_size, np.uint64)
        self._history = np.full((limits.slots, limits.context_len), -1)
        self._length = np.full(limits.slots, -1)
        self._pages = np.zeros((limits.slots, limits.pages_per_row), np.int64)
        self._slots: dict[int, dict[str, Any]] = {}
        powers, inverse = [1], pow(_M, -1, 2**64)
        inverses = [1]
        for _ in range(limits.context_len):
            powers.append(powers[-1] * _M & _MASK)
            inverses.append(inverses[-1] * inverse & _MASK)
        self._powers, self._inverses = np.array(powers, np.uint64), np.array(inverses, np.uint64)

    def close(self) -> None:
        """Nothing is held."""

    def write_slot(self, slot: int, values: Mapping[str, Any]) -> None:
        self._slots[slot] = dict(values)
        # What the last request left there must not matter.
        self._history[slot], self._pages[slot], self._length[slot] = -1, 0, -1
        for name, table in (("history", self._history), ("pages", self._pages)):
            first = values.get(name, ())
            table[slot, : len(first)] = first

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray]) -> Step:
        limits, kind = self.plan.limits, self.plan.steps[bucket.phase]
        assert bucket in self.plan.buckets
        assert set(step) == {field.name for field in kind.staged}
        rows, tokens = int((step["query_len"] > 0).sum()), int(step["query_len"].sum())
        self._check_padding(bucket, step, rows, tokens)
        results = {f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in kind.results}
        if bucket.phase == DECODE:
            assert (step["query_len"][:rows] == 1).all()
        assert len(set(step["row_slot"][:rows].tolist())) == rows, "two rows of a step have one slot"
        self._grow(step, rows)
        places = [self._write_row(row, step) for row in range(rows)]
        written = np.concatenate(places)
        assert len(set(written.tolist())) == tokens, "two tokens of a step are written to one place"
        assert (written >= limits.page_size).all(), "a live token is written to the null page"
        for row in range(rows):
            slot = int(step["row_slot"][row])
            last = self._read_row(slot)
            if bucket.phase == INPUT_LOGPROBS:
                self._score_row(row, step, places[row], results)
            if step["sample_slot"][row] != limits.null_slot:
                assert step["sample_slot"][row] == slot
                results["tokens"][row] = self._sample(slot, last)
        self.steps.append((bucket, rows, tokens))
        return Step(results)

    def _sample(self, slot: int, folded: int) -> int:
        end = int(self._length[slot])
        assert end >= self._slots[slot]["prompt_len"], "a token is sampled inside of a prompt"
        token = sample(folded, self._slots[slot]["seed"])
        if end < self.plan.limits.context_len:
            self._history[slot, end] = token
        return token

    def _check_padding(self, bucket: Bucket, step: Mapping[str, np.ndarray], rows: int, tokens: int) -> None:
        assert (step["query_len"][:rows] > 0).all(), "a padding row lies between live ones"
        for field in self.plan.steps[bucket.phase].staged:
            array = step[field.name]
            assert array.shape == field.spec.at(bucket.sizes)
            assert array.dtype == field.spec.dtype
            of_tokens = field.spec.shape[0] == "T"
            live = array[tokens if of_tokens else rows :]
            assert (live == field.default).all(), f"{field.name} of padding"

    def _grow(self, step: Mapping[str, np.ndarray], rows: int) -> None:
        for row in range(rows):
            slot, at = int(step["row_slot"][row]), int(step["grow_at"][row])
            for g, page in enumerate(step["grow_page"][row].tolist()):
                if page:
                    assert self._pages[slot, at + g] == 0, "a page takes the place of another"
                    self._pages[slot, at + g] = page

    def _places(self, slot: int, at: np.ndarray) -> np.ndarray:
        size = self.plan.limits.page_size
        return self._pages[slot, at // size] * size + at % size

    def _write_row(self, row: int, step: Mapping[str, np.ndarray]) -> np.ndarray:
        """Record a row's tokens, and what stands for their keys and values; where they lie."""
        first, count = int(step["query_start"][row]), int(step["query_len"][row])
        slot, start = int(step["row_slot"][row]), int(step["row_start"][row])
        assert slot != self.plan.limits.null_slot
        if start < 0:
            start = int(self._length[slot])
            assert start >= 0, "a length is taken from the device that has none"
        assert self._length[slot] in (-1, start), "host and device differ in the length of a sequence"
        at = np.arange(start, start + count)
        places = self._places(slot, at)
        given = step["token_ids"][first : first + count]
        tokens = np.where(given >= 0, given, self._history[slot, at])
        assert (tokens >= 0).all(), "a token is taken from the device that never sampled it"
        self._run(slot, at, tokens, places)
        return places

    def _run(self, slot: int, at: np.ndarray, tokens: np.ndarray, places: np.ndarray) -> None:
        self._history[slot, at] = tokens
        self._tokens[places] = tokens
        before = int(self._folds[self._places(slot, at[:1] - 1)[0]]) if at[0] else 0
        for place, token in zip(places.tolist(), tokens.tolist(), strict=True):
            before = (before * _M + token + 1) & _MASK
            self._folds[place] = before
        self._length[slot] = at[-1] + 1

    def _score_row(
        self, row: int, step: Mapping[str, np.ndarray], places: np.ndarray, results: dict[str, np.ndarray]
    ) -> None:
        """Log-probabilities of the tokens behind a row's, where they are somebody's."""
        for at, place in enumerate(places.tolist(), start=int(step["query_start"][row])):
            if step["target_slot"][at] != self.plan.limits.null_slot:
                assert step["target_slot"][at] == step["row_slot"][row], "a score of another's token"
                folded, target = int(self._folds[place]), int(step["target_ids"][at])
                results["target_logprob"][at] = score(folded, target)

    def _read_row(self, slot: int) -> int:
        """Check a sequence's whole context; the hash of it."""
        end = int(self._length[slot])
        places = self._places(slot, np.arange(end))
        assert (places >= self.plan.limits.page_size).all(), "a context reaches into the null page"
        tokens = self._tokens[places]
        terms = (tokens + 1).astype(np.uint64) * self._inverses[:end]
        folds = np.cumsum(terms, dtype=np.uint64) * self._powers[:end]
        assert (folds == self._folds[places]).all(), "a page in the context is not of this sequence"
        if self._slots[slot].get("presence_penalty"):
            assert (self._history[slot, :end] == tokens).all(), "the history lacks tokens of the context"
        return int(folds[-1])
