"""An executable that computes nothing but checks what it is given: its next token is a hash of the context.

It keeps what a device keeps of a sequence: its length, its tokens, and for each cache group its page list or its
state. What stands in for keys and values of a token is a hash of it and of all tokens before it, as the real
ones depend on all of these. A row's context is read back through its page list, as far as the group's window
reaches: a token that was written to a wrong page, a page or a state that was given away too early or never
told of, a prefix of another sequence, or a position off by one are found in the very step that would read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_cache import MASK, FakePages, FakeStates, fold

from makeready.graphs.plan.spec import DECODE, EXTEND, INPUT_LOGPROBS, Bucket, CacheGroup, CacheSpec, Limits
from makeready.graphs.plan.speculative import Speculative
from makeready.graphs.planner.request import Request
from makeready.graphs.steps.base import declare

VOCABULARY = 50


def sample(folded: int, seed: int) -> int:
    """The next token of a sequence with this hash."""
    mixed = (folded ^ (seed * 0xBF58476D1CE4E5B9)) & MASK
    mixed = ((mixed ^ mixed >> 30) * 0x94D049BB133111EB) & MASK
    return (mixed ^ mixed >> 31) % VOCABULARY


def allowed_of(words: np.ndarray, token: int) -> int:
    """The token, or the next one that a mask allows; -1 where none is."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCABULARY]
    return next((t % VOCABULARY for t in range(token, token + VOCABULARY) if bits[t % VOCABULARY]), -1)


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

    def __init__(self, results: dict[str, np.ndarray], early: Sequence[str] = ()) -> None:
        self._results = results
        self._early = early

    def wait(self) -> Mapping[str, np.ndarray]:
        return self._results

    def early(self) -> Mapping[str, np.ndarray]:
        return {name: self._results[name] for name in self._early}


class FakeExecutable:
    """See the module's docstring; ``steps`` keeps (bucket, live rows, live tokens) of every launch."""

    def __init__(
        self,
        limits: Limits,
        buckets: Sequence[Bucket],
        pages: int,
        asynchronous: bool = True,
        cache: CacheSpec | None = None,
        blocks: Mapping[str, int] | None = None,
        speculative: Speculative | None = None,
    ) -> None:
        scored = max((b.tokens for b in buckets if b.phase == INPUT_LOGPROBS), default=0)
        kv = cache or CacheSpec(limits.page_size, (CacheGroup("kv", (), limits.page_size),))
        steps, slots = declare(
            limits, Request(max_logprob_tokens=scored, speculative=speculative or Speculative()), kv
        )
        self.plan: Any = SimpleNamespace(
            limits=limits, buckets=tuple(buckets), steps=steps, slots=slots, kv=kv
        )
        self.pages = pages
        self.blocks: Mapping[str, int] = {kv.groups[0].name: pages, **(blocks or {})}
        self.asynchronous = asynchronous
        self.steps: list[tuple[Bucket, int, int]] = []
        self._history = np.full((limits.slots, limits.context_len), -1)
        self._length = np.full(limits.slots, -1)
        self._slots: dict[int, dict[str, Any]] = {}
        self._allowed = np.zeros((limits.slots, limits.mask_places * limits.mask_words), np.int32)
        self._at_cut: Callable[[], None] | None = None
        self.paged = {g.name: FakePages(kv, g, self.blocks[g.name], limits) for g in kv.paged}
        self.states = {g.name: FakeStates(kv, g, self.blocks[g.name]) for g in kv.states}

    def close(self) -> None:
        """Nothing is held."""

    def write_slot(self, slot: int, values: Mapping[str, Any]) -> None:
        self._slots[slot] = dict(values)
        # What the last request left there must not matter.
        self._history[slot], self._length[slot] = -1, -1
        first = values.get("history", ())
        self._history[slot, : len(first)] = first
        for group in self.paged.values():
            group.write_slot(slot, values)

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> Step:
        assert self._at_cut is None, "a step stands at its cut while another is launched"
        limits, kind = self.plan.limits, self.plan.steps[bucket.phase]
        assert bucket in self.plan.buckets
        assert set(step) == {field.name for field in kind.staged}
        rows, tokens = int((step["query_len"] > 0).sum()), int(step["query_len"].sum())
        self._check_padding(bucket, step, rows, tokens)
        results = {f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in kind.results}
        if bucket.phase == DECODE:
            assert (step["query_len"][:rows] == 1).all()
        assert len(set(step["row_slot"][:rows].tolist())) == rows, "two rows of a step have one slot"
        self._begin(step, rows)
        folds = [self._write_row(row, step) for row in range(rows)]
        for row in range(rows):
            slot = int(step["row_slot"][row])
            self._read_row(slot, int(self._length[slot]) - len(folds[row]))
            if bucket.phase == INPUT_LOGPROBS:
                self._score_row(row, step, folds[row], results)
        self._end()
        samples = step["sample_slot"][:rows].copy()

        def draw() -> None:
            for row, slot in enumerate(samples.tolist()):
                if slot != limits.null_slot:
                    results["tokens"][row] = self._sample(slot, folds[row][-1])

        assert (step["row_slot"][:rows] == samples)[samples != limits.null_slot].all()
        if cut:
            self._at_cut = draw
        else:
            assert not any(
                self._slots[slot]["masked"] for slot in samples.tolist() if slot != limits.null_slot
            )
            draw()
        self.steps.append((bucket, rows, tokens))
        return Step(results)

    def resume(self, late: Mapping[int, Mapping[str, Any]]) -> None:
        assert self._at_cut is not None, "nothing stands at a cut"
        draw, self._at_cut = self._at_cut, None
        for slot, values in late.items():
            (words,) = values.values()
            self._allowed[slot, : len(words)] = words
        draw()

    def agrees(self, slot: int, start: int) -> bool:
        """Whether the host may say that a sequence has this length."""
        return self._length[slot] in (-1, start)

    def mask(self, slot: int, place: int) -> np.ndarray:
        """Of the masks that a slot has, that of the token in this place of its sequence."""
        masks = self._allowed[slot].reshape(-1, self.plan.limits.mask_words)
        return masks[place % len(masks)]

    def _begin(self, step: Mapping[str, np.ndarray], rows: int) -> None:
        """Take the pages and read the states that a step names."""
        for group in self.paged.values():
            for row in range(rows):
                at, pages = int(step["grow_at"][row]), step[group.grow_field][row].tolist()
                group.grow(int(step["row_slot"][row]), at, pages)
        for group in self.states.values():
            group.begin(step, rows)
        self._written: dict[str, list[int]] = {name: [] for name in self.paged}

    def _end(self) -> None:
        for group in self.states.values():
            group.end()
        for places in self._written.values():
            assert len(set(places)) == len(places), "two tokens of a step are written to one place"

    def _sample(self, slot: int, folded: int) -> int:
        end = int(self._length[slot])
        assert end >= self._slots[slot]["prompt_len"], "a token is sampled inside of a prompt"
        token = sample(folded, self._slots[slot]["seed"])
        if self._slots[slot]["masked"]:
            token = allowed_of(self.mask(slot, end), token)
        if end < self.plan.limits.context_len:
            self._history[slot, end] = max(token, 0)
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

    def _write_row(self, row: int, step: Mapping[str, np.ndarray]) -> list[int]:
        """Record a row's tokens, and what stands for their keys and values; the hash up to each."""
        first, count = int(step["query_start"][row]), int(step["query_len"][row])
        slot, start = int(step["row_slot"][row]), int(step["row_start"][row])
        assert slot != self.plan.limits.null_slot
        if start < 0:
            start = int(self._length[slot])
            assert start >= 0, "a length is taken from the device that has none"
        assert self.agrees(slot, start), "host and device differ in the length of a sequence"
        at = np.arange(start, start + count)
        given = step["token_ids"][first : first + count]
        tokens = np.where(given >= 0, given, self._history[slot, at])
        assert (tokens >= 0).all(), "a token is taken from the device that never sampled it"
        return self._run(slot, at, tokens)

    def _run(self, slot: int, at: np.ndarray, tokens: np.ndarray) -> list[int]:
        groups = (*self.paged.values(), *self.states.values())
        value, *others = (group.before(slot, int(at[0])) for group in groups)
        assert all(other == value for other in others), "cache groups differ in what went before"
        self._history[slot, at] = tokens
        folds = [value := fold([token], value) for token in tokens.tolist()]
        for name, group in self.paged.items():
            self._written[name] += group.write(slot, at, tokens.tolist(), folds).tolist()
        for group in self.states.values():
            group.write(slot, at, tokens.tolist(), folds)
        self._length[slot] = at[-1] + 1
        return folds

    def _score_row(
        self, row: int, step: Mapping[str, np.ndarray], folds: list[int], results: dict[str, np.ndarray]
    ) -> None:
        """Log-probabilities of the tokens behind a row's, where they are somebody's."""
        for at, folded in enumerate(folds, start=int(step["query_start"][row])):
            if step["target_slot"][at] != self.plan.limits.null_slot:
                assert step["target_slot"][at] == step["row_slot"][row], "a score of another's token"
                results["target_logprob"][at] = score(folded, int(step["target_ids"][at]))

    def _read_row(self, slot: int, first: int) -> None:
        """Check all that a row's tokens from ``first`` on read."""
        end = int(self._length[slot])
        for group in self.paged.values():
            tokens = group.read(slot, first, end)
            if self._slots[slot].get("presence_penalty"):
                seen = self._history[slot, end - len(tokens) : end]
                assert (seen == tokens).all(), "the history lacks tokens of the context"
