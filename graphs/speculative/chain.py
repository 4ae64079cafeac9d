"""Drafts one after the other: a drafter runs a token of every row at a time, and what it samples is its next token.

Drafts are drawn as the model's own tokens are, with the sequence's parameters and noise. Noise is a hash of seed,
position and token, so a drafter that is nearly right about probabilities mostly draws the same token.

    T tokens, R rows, V vocabulary
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from makeready.graphs.checkpoint.paired import DRAFT
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import constant
from makeready.graphs.models.family import Model
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import CacheGroup, KVPart, Limits
from makeready.graphs.plan.speculative import Speculative
from makeready.graphs.speculative.base import Guesses, Setting
from makeready.graphs.speculative.tree import Tables, Tree
from makeready.graphs.steps.generate import draw, paged
from makeready.kernels.step import draft_chain


class Drafter(Protocol):
    """What follows a model's tokens and guesses the next: its inputs name its own cache tensors plainly."""

    @property
    def behind(self) -> int:
        """Places that its entry of a token is before the token: 0, or 1 of one that is made of the token and of the
        model's hidden state before it.
        """
        ...

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Parameters of its own by name."""
        ...

    def parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        """Its cache tensors."""
        ...

    def follow(self, ids_T: torch.Tensor, inputs: Inputs) -> None:
        """Put entries of tokens that the model has just run into the cache."""
        ...

    def begin(self, inputs: Inputs) -> torch.Tensor | None:
        """What :meth:`step` is given first, of every row."""
        ...

    def step(
        self, ids_R: torch.Tensor, before_RC: torch.Tensor | None, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits ``[R, V]`` behind a token of every row, and what the next step is given."""
        ...


class Followed:
    """A model whose every token a drafter runs behind it, so that its cache is never behind: a Model, too.

    The drafter's tensors are parts of the cache group that keeps everything, so that pages hold both models' tokens.
    """

    def __init__(self, target: Model, drafter: Drafter, setting: Setting) -> None:
        self.target, self.drafter = target, drafter
        slots, asked = setting.limits.slots, setting.request.speculative
        self.tables = Tables(asked.tree) if asked.tree else None
        # Drafts are drawn without masks: what those say may come while a step runs.
        self.unmasked = constant((slots,), "zeros", {"shape": [slots]}, dtype="int32")
        self.no_mask = constant((slots, 1), "zeros", {"shape": [slots, 1]}, dtype="int32")

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        own = (("unmasked", self.unmasked), ("no_mask", self.no_mask))
        yield from self.target.named_parameters()
        tables = self.tables.named_parameters() if self.tables else ()
        for name, tensor in itertools.chain(self.drafter.named_parameters(), own, tables):
            yield DRAFT + name, tensor

    def parameters(self) -> Iterator[Any]:
        return (tensor for _, tensor in self.named_parameters())

    def cache_groups(self, page_size: int, dtype: str, state_dtype: str) -> tuple[CacheGroup, ...]:
        groups = self.target.cache_groups(page_size, dtype, state_dtype)
        self.group = next((g.name for g in groups if g.unit is not None and not g.window), "")
        if not self.group:
            raise PlanError(
                "all of the model's layers have windows, and what drafts needs pages that stay; use "
                "speculative.method=ngram"
            )
        parts = tuple(replace(p, name=DRAFT + p.name) for p in self.drafter.parts(page_size, dtype))
        return tuple(replace(g, parts=g.parts + parts) if g.name == self.group else g for g in groups)

    def __call__(self, ids_T: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        logits = self.target(ids_T, inputs)
        self.drafter.follow(ids_T, inputs.beside(self.group, DRAFT))
        return logits

    def guess(self, inputs: Inputs, limits: Limits, asked: Speculative) -> Guesses:
        """Drafts of all rows, each left in its place of the history."""
        i, drafter = inputs.beside(self.group, DRAFT), self.drafter
        start, drafts = draft_chain.count_drafts(
            i.token_ids, i.row_slot, i.row_start, i.query_start, i.query_len, i.limit, i.length
        )
        before = None
        for step in range(asked.num_draft_tokens):
            ids, at, slots, place = self._placed(i, start, drafts, limits, step)
            before = drafter.begin(at) if step == 0 else before
            logits, before = drafter.step(ids, before, at)
            draw(logits, i.adding(sample_slot=slots, context_len=place, **self._unmasked))
        made = draft_chain.pack_drafts(
            i.token_ids, i.row_slot, i.query_start, i.query_len, i.sample_slot, start, drafts, i.history
        )
        return Guesses(*made)

    @property
    def tree(self) -> Tree:
        """Its drafts as trees, where it was asked for these."""
        assert self.tables is not None
        return Tree(self.tables, self.drafter, self.group, self._unmasked)

    @property
    def _unmasked(self) -> dict[str, torch.Tensor]:
        return {"masked": self.unmasked, "allowed": self.no_mask}

    def _placed(
        self, i: Inputs, start: torch.Tensor, drafts: torch.Tensor, limits: Limits, step: int
    ) -> tuple[torch.Tensor, Inputs, torch.Tensor, torch.Tensor]:
        """Ids of the tokens of a step, one a row, inputs of it, and the slot and the place that is drawn for."""
        ids, positions, row_slot, query_start, query_len, context_len, slots, place = draft_chain.next_draft(
            i.row_slot, i.sample_slot, start, drafts, i.history, step=step, behind=self.drafter.behind
        )
        at = i.adding(
            positions=positions, token_slot=row_slot, row_slot=row_slot,
            query_start=query_start, query_len=query_len, context_len=context_len,
        )  # fmt: skip
        return ids, paged(at, limits), slots, place


@dataclass(frozen=True)
class Chained:
    """What methods have in common whose ``model`` is a :class:`Followed`."""

    own: tuple[str, ...] = ("tree",)

    def check(self, asked: Speculative) -> None: ...

    def guess(self, model: Model, inputs: Inputs, limits: Limits, asked: Speculative) -> Guesses:
        """See :class:`~makeready.graphs.speculative.base.Method`."""
        assert isinstance(model, Followed)
        return model.guess(inputs, limits, asked)
