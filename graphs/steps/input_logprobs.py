"""Steps that report how probable each of their tokens made the next one, besides sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.plan.buckets import Shapes
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import INPUT_LOGPROBS, CacheSpec, Field, Limits, StepSpec, fields
from makeready.graphs.steps.base import Sizing, step_kind
from makeready.graphs.steps.generate import (
    run,
    sample,
    sampling_slot,
    sequence_fields,
    sequence_slot,
    token_results,
)
from makeready.kernels import elementwise
from makeready.kernels.sample import logprobs
from makeready.kernels.spec import TOKENS

if TYPE_CHECKING:
    from makeready.graphs.models.family import Model
    from makeready.graphs.planner.request import Request

BUCKETS = 4  # such steps are mostly full


@dataclass(frozen=True)
class InputLogprobs:
    """Rows of any length. A step has few tokens, since all their logits exist at once."""

    name: str = INPUT_LOGPROBS

    def spec(self, limits: Limits, request: Request, cache: CacheSpec) -> StepSpec | None:
        tokens, top = request.max_logprob_tokens, limits.max_top_logprobs
        if type(tokens) is not int or not (tokens == 0 or limits.max_rows <= tokens <= limits.max_tokens):
            raise PlanError(
                f"plan.max_logprob_tokens={tokens} must be 0, or from plan.max_rows={limits.max_rows} to the "
                f"{limits.max_tokens} tokens of a step"
            )
        if not tokens:
            return None
        targets = fields(
            ("target_ids", (TOKENS,), "int32", 0),  # the token behind each
            ("target_slot", (TOKENS,), "int32", limits.null_slot),  # the slot that asks for it, or nobody's
        )
        reported = fields(
            ("target_logprob", (TOKENS,), "float32", 0.0),  # of the token behind each
            ("target_top_ids", (TOKENS, top), "int32", -1),
            ("target_top_values", (TOKENS, top), "float32", 0.0),
        )
        staged = sequence_fields(limits, cache) + targets
        return StepSpec(limits.max_rows, tokens, None, staged, token_results(limits) + reported)

    def slot(self, limits: Limits, cache: CacheSpec) -> tuple[Field, ...]:
        return sequence_slot(limits, cache) + sampling_slot(limits)

    def trace(
        self, model: Model, inputs: Inputs, limits: Limits, request: Request
    ) -> Mapping[str, torch.Tensor]:
        logits, i = run(model, inputs, limits)
        made = sample(elementwise.gather_last(logits, i.query_start, i.query_len), i, limits)
        logprob, top_ids, top_values = logprobs.token_logprobs(
            logits, i.target_ids, i.target_slot, i.top_logprobs, max_top=limits.max_top_logprobs
        )
        of_input = {"target_logprob": logprob, "target_top_ids": top_ids, "target_top_values": top_values}
        return made | of_input

    def shapes(self, sizing: Sizing) -> Shapes:
        return Shapes(count=min(sizing.max_extend_buckets, BUCKETS), row_counts=1)


step_kind(InputLogprobs())
