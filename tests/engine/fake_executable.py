"""An executable that computes nothing but remembers everything: its next token is a hash of the context.

The context is read back through the page table from what was written through ``kv_slot``, so a token
written to the wrong page, a page owned twice, or a position off by one changes every later token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from makeready.graphs.spec import Bucket, Limits, result_fields

VOCABULARY = 50


def next_token(context: Sequence[int], seed: int) -> int:
    """What a request with these tokens and this seed samples next, whoever runs beside it."""
    text = ",".join(map(str, [seed, *context]))
    return hashlib.sha256(text.encode()).digest()[0] % VOCABULARY


def alone(prompt: Sequence[int], seed: int, count: int, end_ids: frozenset[int]) -> list[int]:
    """Brute force: the tokens of a request by itself."""
    tokens: list[int] = []
    while len(tokens) < count and not (tokens and tokens[-1] in end_ids):
        tokens.append(next_token([*prompt, *tokens], seed))
    return tokens


class FakeExecutable:
    """See the module's docstring; ``steps`` keeps (bucket, live rows, live tokens) of every launch."""

    def __init__(self, limits: Limits, buckets: Sequence[Bucket], pages: int) -> None:
        self.plan: Any = SimpleNamespace(limits=limits, buckets=tuple(buckets))
        self.pages = pages
        self.steps: list[tuple[Bucket, int, int]] = []
        self._kv = np.full(pages * limits.page_size, -1)
        self._history = np.full((limits.slots, limits.context_len), -1)
        self._slots: dict[int, dict[str, Any]] = {}

    def write_slot(self, slot: int, values: Mapping[str, Any]) -> None:
        self._slots[slot] = dict(values)

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray]) -> FakeExecutable:
        limits = self.plan.limits
        live = step["token_slot"] != limits.null_slot
        for t in np.flatnonzero(live):
            place = (step["token_slot"][t], step["positions"][t])
            token = step["token_ids"][t] if step["token_ids"][t] >= 0 else self._history[place]
            assert token >= 0, "a token is taken from the device that never sampled it"
            self._history[place] = token
            assert step["kv_slot"][t] >= limits.page_size, "a live token is written to the null page"
            self._kv[step["kv_slot"][t]] = token
        self._results = {
            f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in result_fields(limits)
        }
        for row in np.flatnonzero(step["row_slot"] != limits.null_slot):
            self._run_row(row, step)
        self.steps.append((bucket, int((step["query_len"] > 0).sum()), int(live.sum())))
        return self

    def _run_row(self, row: int, step: Mapping[str, np.ndarray]) -> None:
        size, slot = self.plan.limits.page_size, step["row_slot"][row]
        at = np.arange(step["context_len"][row])
        context = self._kv[step["page_table"][row][at // size] * size + at % size]
        assert (context == self._history[slot][at]).all(), "the cache holds another request's tokens"
        token = next_token(context.tolist(), self._slots[slot]["seed"])
        if len(at) < self.plan.limits.context_len:
            self._history[slot, len(at)] = token
        self._results["tokens"][row] = token

    def wait(self) -> Mapping[str, np.ndarray]:
        return self._results
