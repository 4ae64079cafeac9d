"""What followed the last tokens where they came before follows again (prompt lookup, Saxena 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.models.family import Model
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import Limits
from makeready.graphs.plan.speculative import Speculative
from makeready.graphs.speculative.base import Guesses, Setting, method
from makeready.kernels.step import draft

MOST_NGRAM = 32  # tokens: the whole context is searched for an n-gram of this length at most


@dataclass(frozen=True)
class NGram:
    """A look-up in the sequence itself."""

    name: str = "ngram"
    own: tuple[str, ...] = ("ngram_min", "ngram_max")
    second: bool = False

    def check(self, asked: Speculative) -> None:
        if asked.ngram_min > asked.ngram_max:
            raise PlanError(
                f"speculative.ngram_min={asked.ngram_min} is above ngram_max={asked.ngram_max}; lower it"
            )
        if asked.ngram_max > MOST_NGRAM:
            raise PlanError(
                f"speculative.ngram_max={asked.ngram_max} is above {MOST_NGRAM}, the most that are compared; lower it"
            )

    def model(self, target: Model, setting: Setting) -> Model:
        return target

    def guess(self, model: Model, inputs: Inputs, limits: Limits, asked: Speculative) -> Guesses:
        i = inputs
        made = draft.draft_ngram(
            i.token_ids, i.row_slot, i.row_start, i.query_start, i.query_len, i.sample_slot, i.limit,
            i.length, i.history, ngram_min=asked.ngram_min, ngram_max=asked.ngram_max,
        )  # fmt: skip
        return Guesses(*made)


method(NGram())
