"""An executable that computes nothing but checks what it is given: its next token is a hash of the context.

What stands in for keys and values of a token is a hash of it and of all tokens before it, as the real ones
depend on all of these. A row's context is read back through its page table: a token that was written to a
wrong page, a page that was given away too early, a prefix of another sequence, or a position off by one are
found in the very step that would read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from makeready.graphs.spec import DECODE, EXTEND, SCORE, Bucket, Limits, result_fields, step_fields

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


def buckets_of(limits: Limits) -> list[Bucket]:
    """A few of each phase, the largest included."""
    rows, tokens = limits.max_rows, limits.max_tokens
    decode = {Bucket(DECODE, r, r) for r in (1, rows)}
    extend = {Bucket(EXTEND, min(r, t), t) for r in (1, rows) for t in (max(1, tokens // 3), tokens)}
    most = limits.max_logprob_tokens
    scoring = {Bucket(SCORE, min(rows, t), t) for t in (most // 2, most) if t}
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
        self.plan: Any = SimpleNamespace(limits=limits, buckets=tuple(buckets))
        self.pages = pages
        self.asynchronous = asynchronous
        self.steps: list[tuple[Bucket, int, int]] = []
        self._tokens = np.full(pages * limits.page_size, -1)
        self._folds = np.zeros(pages * limits.page_size, np.uint64)
        self._history = np.full((limits.slots, limits.context_len), -1)
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
        self._history[slot] = -1  # what the last request left there must not matter
        history = values.get("history", ())
        self._history[slot, : len(history)] = history

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray]) -> Step:
        limits = self.plan.limits
        assert bucket in self.plan.buckets
        assert set(step) == {field.name for field in step_fields(limits, bucket.phase)}
        rows, tokens = int((step["query_len"] > 0).sum()), int(step["query_len"].sum())
        self._check_padding(bucket, step, rows, tokens)
        results = {
            f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype)
            for f in result_fields(limits, bucket.phase)
        }
        written = step["kv_slot"][:tokens]
        assert len(set(written.tolist())) == tokens, "two tokens of a step are written to one place"
        assert (written >= limits.page_size).all(), "a live token is written to the null page"
        if bucket.phase == DECODE:
            assert (step["query_len"][:rows] == 1).all()
        for row in range(rows):
            self._write_row(row, step)
        for row in range(rows):
            last = self._read_row(row, step)
            if bucket.phase == SCORE:
                self._score_row(row, step, results)
            slot, end = int(step["row_slot"][row]), int(step["context_len"][row])
            if slot != limits.null_slot:
                assert end >= self._slots[slot]["prompt_len"], "a token is sampled inside of a prompt"
                token = sample(last, self._slots[slot]["seed"])
                if end < limits.context_len:
                    self._history[slot, end] = token
                results["tokens"][row] = token
        self.steps.append((bucket, rows, tokens))
        return Step(results)

    def _check_padding(self, bucket: Bucket, step: Mapping[str, np.ndarray], rows: int, tokens: int) -> None:
        assert (step["query_len"][:rows] > 0).all(), "a padding row lies between live ones"
        for field in step_fields(self.plan.limits, bucket.phase):
            array = step[field.name]
            assert array.shape == field.spec.at(bucket.sizes)
            assert array.dtype == field.spec.dtype
            of_tokens = field.spec.shape[0] == "T"
            live = array[tokens if of_tokens else rows :]
            if field.name != "target_ids":  # of nobody
                assert (live == field.default).all(), f"{field.name} of padding"

    def _places(self, row: int, step: Mapping[str, np.ndarray], at: np.ndarray) -> np.ndarray:
        size = self.plan.limits.page_size
        return step["page_table"][row][at // size] * size + at % size

    def _write_row(self, row: int, step: Mapping[str, np.ndarray]) -> None:
        """Record a row's tokens, and what stands for their keys and values."""
        start, count = int(step["query_start"][row]), int(step["query_len"][row])
        end = int(step["context_len"][row])
        live, at = slice(start, start + count), np.arange(end - count, end)
        slot = step["token_slot"][start]
        assert (step["token_slot"][live] == slot).all()
        assert slot != self.plan.limits.null_slot
        assert step["row_slot"][row] in (slot, self.plan.limits.null_slot)
        assert (step["positions"][live] == at).all()
        places = self._places(row, step, at)
        assert (step["kv_slot"][live] == places).all(), "a token is written where its row does not read it"
        given = step["token_ids"][live]
        tokens = np.where(given >= 0, given, self._history[slot, at])
        assert (tokens >= 0).all(), "a token is taken from the device that never sampled it"
        self._history[slot, at] = tokens
        self._tokens[places] = tokens
        before = int(self._folds[self._places(row, step, at[:1] - 1)[0]]) if at[0] else 0
        for place, token in zip(places.tolist(), tokens.tolist(), strict=True):
            before = (before * _M + token + 1) & _MASK
            self._folds[place] = before

    def _score_row(self, row: int, step: Mapping[str, np.ndarray], results: dict[str, np.ndarray]) -> None:
        """Log-probabilities of the tokens behind a row's, where they are somebody's."""
        start, count = int(step["query_start"][row]), int(step["query_len"][row])
        end = int(step["context_len"][row])
        places = self._places(row, step, np.arange(end - count, end))
        for at, place in zip(range(start, start + count), places.tolist(), strict=True):
            if step["target_slot"][at] != self.plan.limits.null_slot:
                assert step["target_slot"][at] == step["token_slot"][at], "a score of another's token"
                folded, target = int(self._folds[place]), int(step["target_ids"][at])
                results["target_logprob"][at] = score(folded, target)

    def _read_row(self, row: int, step: Mapping[str, np.ndarray]) -> int:
        """Check a row's whole context; the hash of it."""
        end = int(step["context_len"][row])
        places = self._places(row, step, np.arange(end))
        assert (places >= self.plan.limits.page_size).all(), "a context reaches into the null page"
        tokens = self._tokens[places]
        terms = (tokens + 1).astype(np.uint64) * self._inverses[:end]
        folds = np.cumsum(terms, dtype=np.uint64) * self._powers[:end]
        assert (folds == self._folds[places]).all(), "a page in the context is not of this sequence"
        slot = int(step["token_slot"][int(step["query_start"][row])])
        if self._slots[slot].get("presence_penalty"):
            assert (self._history[slot, :end] == tokens).all(), "the history lacks tokens of the context"
        return int(folds[-1])
