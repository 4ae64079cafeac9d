"""What scripts/tune.py and its like can be told; see engine/entrypoints/options.py."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from makeready.engine.entrypoints.options import BesideOptions, PlanPath, UsageError, literal
from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint


@dataclass
class PlanWithWeights:
    """What scripts are told that run a compiled plan for itself.

    Attributes:
        checkpoint: a Hugging Face folder, a .gguf file, or dummy: random weights of the model= preset.
        model: a preset of conf/model for checkpoint=dummy; its fields can be changed (model.head_dim=64).
    """

    checkpoint: str = literal(MISSING)
    model: dict[str, Any] | None = None
    plan: PlanPath = field(default_factory=PlanPath)
    speculative: BesideOptions = field(default_factory=BesideOptions)

    def check(self, given: Collection[str]) -> None:
        """See :meth:`Job.check`."""
        if (self.checkpoint == "dummy") != (self.model is not None):
            raise UsageError(
                "checkpoint=dummy needs the model that it stands for; add model=qwen3_8b or another of conf/model"
                if self.model is None
                else f"model= is for checkpoint=dummy, but the checkpoint is {self.checkpoint}; drop one of them"
            )

    def open(self) -> Checkpoint:
        """The checkpoint, opened."""
        return self.speculative.beside.open(open_checkpoint(self.checkpoint, config=self.model))


@dataclass
class TuneJob(PlanWithWeights):
    """Options of scripts/tune.py.

    Attributes:
        context: tokens of context of a row that decodes.
    """

    context: int = MISSING

    def check(self, given: Collection[str]) -> None:
        super().check(given)
        if self.context < 1:
            raise UsageError(f"context={self.context} must be at least 1")
