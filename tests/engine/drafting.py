"""A device that guesses: its steps of kind ``verify`` run drafts that it makes up, right or wrong as chance has it.

It keeps keys and values of wrong drafts where a real device does, in the pages behind the sequence, and its history
holds what was sampled behind them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fake_executable import VOCABULARY, FakeExecutable, Step, allowed_of, sample

from makeready.graphs.plan.spec import VERIFY, Bucket, CacheSpec, Limits
from makeready.graphs.plan.speculative import Speculative


class DraftingExecutable(FakeExecutable):
    """``accepted`` counts how many drafts of how many were right, over all rows and steps; ``masked_accepted`` those
    of rows under a constraint.
    """

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
        drafts = limits.max_gain - 1
        asked = Speculative("ngram", num_draft_tokens=drafts)
        super().__init__(limits, buckets, pages, asynchronous, cache, blocks, asked)
        most, each = self.plan.steps[VERIFY].rows, limits.max_gain
        own = {Bucket(VERIFY, rows, rows * each) for rows in (1, most)}
        self.plan.buckets = tuple(sorted({*buckets, *own}))
        self.accepted: Counter[tuple[int, int]] = Counter()
        self.masked_accepted = 0
        self._random = random.Random(seed)

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> Step:
        if bucket.phase != VERIFY:
            return super().launch(bucket, step, cut=cut)
        assert self._at_cut is None, "a step stands at its cut while another is launched"
        kind = self.plan.steps[VERIFY]
        assert bucket in self.plan.buckets
        assert set(step) == {field.name for field in kind.staged}
        rows, tokens = int((step["query_len"] > 0).sum()), int(step["query_len"].sum())
        self._check_padding(bucket, step, rows, tokens)
        assert (step["token_ids"][:tokens] == -1).all()
        results: dict[str, Any] = {
            f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in kind.results
        }
        self._begin(step, rows)
        runs = [self._guess(row, step) for row in range(rows)]
        for slot, start, _, _ in runs:
            self._read_row(slot, start)
        self._end()
        results["draft_len"][:rows] = [len(ids) for _, _, ids, _ in runs]
        guessed = [token for _, _, ids, _ in runs for token in ids]
        results["draft_ids"][:tokens] = 0
        results["draft_ids"][: len(guessed)] = guessed

        def draw() -> None:
            at = 0
            for row, (slot, start, ids, sampled) in enumerate(runs):
                if self._slots[slot]["masked"]:  # what may come is known by now
                    assert cut
                    places = enumerate(sampled, start + 1)
                    sampled = [allowed_of(self.mask(slot, place), token) for place, token in places]
                right = 0
                while right + 1 < len(ids) and ids[right + 1] == sampled[right]:
                    right += 1
                self._history[slot, start + 1 : start + 1 + len(ids)] = sampled
                self._length[slot] = start + 1 + right
                results["tokens"][at : at + len(ids)] = sampled
                results["drafted"][row], results["accepted"][row] = len(ids) - 1, right
                self.accepted[right, len(ids) - 1] += 1
                self.masked_accepted += right if self._slots[slot]["masked"] else 0
                at += len(ids)

        if cut:
            self._at_cut = draw
        else:
            draw()
        self.steps.append((bucket, rows, tokens))
        return Step(results, kind.early)

    def agrees(self, slot: int, start: int) -> bool:
        """The host takes drafts back that came true behind a token which is followed by others now."""
        taken_back = int(self._length[slot]) - start
        forced = self._slots[slot]["masked"] and 0 < taken_back < self.plan.limits.max_gain
        return forced or super().agrees(slot, start)

    def right(self, slot: int, place: int, sampled: int) -> int:
        """The draft for a place that is surely right, where ``sampled`` comes there if all may."""
        return sampled

    def _guess(self, row: int, step: Mapping[str, np.ndarray]) -> tuple[int, int, list[int], list[int]]:
        """Run a row's token and its drafts: slot, tokens before, tokens that were run, and what each samples."""
        slot, limit, rng = int(step["row_slot"][row]), int(step["limit"][row]), self._random
        assert step["row_start"][row] == -1, "the host says a length that only the device knows"
        start = int(self._length[slot])
        most = min(int(step["query_len"][row]), limit - 1 - start)
        assert most >= 1, "a row runs that has come to its end"
        skill, ids, sampled = rng.choice([0.0, 0.7, 1.0]), [int(self._history[slot, start])], list[int]()
        for n in range(rng.choice([1, most, most])):
            if n:
                right = self.right(slot, start + n, sampled[-1])
                wrong = (right + rng.randrange(1, VOCABULARY)) % VOCABULARY
                ids.append(right if rng.random() < skill else wrong)
            (folded,) = self._run(slot, np.array([start + n]), np.array(ids[-1:]))
            self._history[slot, start + n] = ids[-1]
            sampled.append(sample(folded, self._slots[slot]["seed"]))
        return slot, start, ids, sampled
