"""Steps that check guesses: every row runs its last token and drafts behind it, and samples behind each of them.

Nothing of it waits for the host. Drafts come from the sequences on the device, what is right is counted there, and
the sequences end there behind it. Keys and values of wrong drafts stay in their places until the next step writes
over them: nobody reads beyond a sequence's length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import TYPE_CHECKING

import torch

from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.plan.buckets import Shapes
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import VERIFY, CacheSpec, Field, Limits, StepSpec, fields
from makeready.graphs.plan.speculative import Speculative
from makeready.graphs.speculative import tree
from makeready.graphs.speculative.base import known
from makeready.graphs.steps.base import Sizing, step_kind
from makeready.graphs.steps.generate import (
    run,
    sample,
    sampling_slot,
    sequence_fields,
    sequence_slot,
    token_results,
)
from makeready.kernels.spec import ROWS, TOKENS
from makeready.kernels.step import draft, draft_forced

if TYPE_CHECKING:
    from makeready.graphs.models.family import Model
    from makeready.graphs.planner.request import Request

_ALL = ("num_draft_tokens", "max_rows")  # fields that every method reads


@dataclass(frozen=True)
class Verify:
    """One token and its drafts a row."""

    name: str = VERIFY

    def spec(self, limits: Limits, request: Request, cache: CacheSpec) -> StepSpec | None:
        asked = request.speculative
        _check(asked, limits, cache, request)
        if asked.method is None:
            return None
        each = 1 + asked.drafts
        rows = min(limits.max_rows, asked.max_rows, limits.max_tokens // each)
        staged = sequence_fields(limits, cache) + fields(
            ("limit", (ROWS,), "int32", 0),  # tokens that the sequence may come to
        )
        counted = fields(
            ("drafted", (ROWS,), "int32", 0),  # drafts that were run
            ("accepted", (ROWS,), "int32", 0),  # of these, the first ones that were right
        )
        if asked.tree:
            results, gain = token_results(limits, TOKENS) + counted, 1 + max(map(len, asked.tree))
            return StepSpec(rows, rows * each, each, staged, results, gain=gain)
        # Where rows follow a grammar, the host says what may come behind each draft.
        guessed = fields(("draft_ids", (TOKENS,), "int32", 0), ("draft_len", (ROWS,), "int32", 0))
        results = token_results(limits, TOKENS) + counted + guessed
        early = tuple(field.name for field in guessed)
        return StepSpec(rows, rows * each, each, staged, results, early)

    def slot(self, limits: Limits, cache: CacheSpec) -> tuple[Field, ...]:
        return sequence_slot(limits, cache) + sampling_slot(limits)

    def trace(
        self, model: Model, inputs: Inputs, limits: Limits, request: Request
    ) -> Mapping[str, torch.Tensor]:
        i, asked = inputs, request.speculative
        assert asked.method is not None
        if asked.tree:
            return tree.check(model, inputs, limits)
        ids, start, count, slots, context = known(asked.method).guess(model, i, limits, asked)
        logits, i = run(model, i.adding(token_ids=ids, query_start=start, query_len=count), limits)
        reach = i.context_len
        made = sample(logits, i.adding(sample_slot=slots, context_len=context), limits)
        checked = ids
        if asked.forced_acceptance is not None:
            checked = draft_forced.force_drafts(made["tokens"], slots, context, share=asked.forced_acceptance)
        drafted, accepted = draft.accept_drafts(
            checked, made["tokens"], i.row_slot, start, count, reach, i.length
        )
        return made | {"drafted": drafted, "accepted": accepted, "draft_ids": ids, "draft_len": count}

    def shapes(self, sizing: Sizing) -> Shapes:
        most = sizing.step.rows
        expected = {rows: weight for rows, weight in sizing.traffic.decode_rows.items() if rows <= most}
        return Shapes(rows=expected, count=sizing.max_decode_buckets)


def _check(asked: Speculative, limits: Limits, cache: CacheSpec, request: Request) -> None:
    """Raise :class:`PlanError` for what cannot be."""
    found = None if asked.method is None else known(asked.method)
    of_use = () if found is None else (*_ALL, *found.own)
    changed = [f.name for f in fields_of(asked) if getattr(asked, f.name) != f.default]
    forced = "forced_acceptance"
    idle = [name for name in changed if name not in (*of_use, "method", *((forced,) if found else ()))]
    if idle:
        what = f"to {found.name}; leave it out" if found else "without a method; add speculative.method=ngram"
        raise PlanError(f"speculative.{idle[0]}={getattr(asked, idle[0])} is of no use {what}")
    if found is None:
        return
    for name in (name for name in of_use if name != "tree"):
        value = getattr(asked, name)
        if type(value) is not int or value < 1:
            raise PlanError(f"speculative.{name}={value} must be a whole number of at least 1")
    share = asked.forced_acceptance
    if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
        raise PlanError(f"speculative.forced_acceptance={share} must be a number from 0 to 1")
    found.check(asked)
    if asked.tree:
        if share is not None:
            raise PlanError("speculative.forced_acceptance is of chains; leave speculative.tree out")
        tree.check_tree(asked.tree, limits, cache, deterministic=request.deterministic)
    said = (
        f"the {asked.drafts} nodes of speculative.tree"
        if asked.tree
        else f"speculative.num_draft_tokens={asked.drafts}"
    )
    if 1 + asked.drafts > limits.max_tokens:
        raise PlanError(
            f"{said} and the token before them do not fit into steps "
            f"of plan.max_tokens={limits.max_tokens}; lower the one or raise the other"
        )
    if cache.states:
        raise PlanError(
            f"speculative.method={asked.method} takes wrong drafts back, and the model's state "
            f"{cache.states[0].name} cannot be taken back; leave speculative.method out"
        )
    if 1 + asked.drafts > limits.context_len:
        verb = "are" if asked.tree else "is"
        raise PlanError(f"{said} {verb} beyond plan.context_len={limits.context_len}; lower it")


step_kind(Verify())
