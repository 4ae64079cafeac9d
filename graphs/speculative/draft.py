"""A small model of the same vocabulary drafts (Leviathan et al. 2022, arXiv:2211.17192)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from makeready.graphs.checkpoint.paired import DRAFT, FIELD
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import Parameter, moved
from makeready.graphs.models import family
from makeready.graphs.models.family import Model
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import KVPart
from makeready.graphs.speculative.base import Setting, method
from makeready.graphs.speculative.chain import Chained, Followed
from makeready.graphs.speculative.second import check_second


class SmallModel:
    """A whole model as a drafter."""

    behind = 0

    def __init__(self, model: Model) -> None:
        self.model = model
        for tensor in model.parameters():
            assert isinstance(tensor, Parameter)
            tensor.declaration = moved(tensor.declaration, DRAFT)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        return self.model.named_parameters()

    def parts(self, page_size: int, dtype: str) -> tuple[KVPart, ...]:
        groups = self.model.cache_groups(page_size, dtype, "float32")  # no states, see below
        if any(group.unit is None or group.window for group in groups) or len(groups) != 1:
            kept = ", ".join(group.name for group in groups)
            raise PlanError(
                f"speculative.method=draft keeps the second model's tokens in the first one's pages, and its cache "
                f"({kept}) has states or pages that go; choose one whose layers all see everything"
            )
        return groups[0].parts

    def follow(self, ids_T: torch.Tensor, inputs: Inputs) -> None:
        self.model(ids_T, inputs)

    def begin(self, inputs: Inputs) -> None:
        return None

    def step(
        self, ids_R: torch.Tensor, before_RC: torch.Tensor | None, inputs: Inputs
    ) -> tuple[torch.Tensor, None]:
        return self.model(ids_R, inputs), None


@dataclass(frozen=True)
class Draft(Chained):
    """A second checkpoint, run token by token ahead of the model."""

    name: str = "draft"
    second: bool = True

    def model(self, target: Model, setting: Setting) -> Model:
        config, limits = setting.checkpoint.config[FIELD], setting.limits
        check_second(self.name, config, limits)
        described = family.family_of(config)
        if described.longest(config) < limits.context_len:
            raise PlanError(
                f"the model that drafts was made for {described.longest(config)} tokens, fewer than plan.context_len="
                f"{limits.context_len}; lower that, or choose another"
            )
        small = described.build(config, context_len=limits.context_len, activation=setting.activation)
        return Followed(target, SmallModel(small), setting)


method(Draft())
