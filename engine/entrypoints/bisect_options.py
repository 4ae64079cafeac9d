"""What scripts/bisect_plan.py can be told; see engine/entrypoints/options.py."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from omegaconf import MISSING

from makeready.engine.entrypoints.options import UsageError, literal
from makeready.engine.entrypoints.tune_options import PlanWithWeights


@dataclass
class BisectJob(PlanWithWeights):
    """Options of scripts/bisect_plan.py.

    Attributes:
        prompt: text that the steps run.
        token_ids: ids that they run instead, such as [1,2,3]; for checkpoints without a tokenizer.
        tokens: how many greedy tokens to generate after it.
        rows: how many times the prompt runs side by side.
    """

    prompt: str | None = literal()
    token_ids: list[int] = field(default_factory=list)
    tokens: int = MISSING
    rows: int = MISSING

    def check(self, given: Collection[str]) -> None:
        super().check(given)
        if (self.prompt is None) == (not self.token_ids):
            found = "nothing to run" if self.prompt is None else "prompt= and token_ids= were given together"
            raise UsageError(f"{found}; give one of prompt=TEXT and token_ids=[ID,ID]")
        for name in ("tokens", "rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
