"""What a kind of step is to the planner: its declaration, its trace, the batches to expect.

A module of this folder registers kinds with :func:`step_kind`; modules are found by themselves. The engine's
twin, which stages a batch of that kind and takes its results in, is registered in ``engine/steps/``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from makeready.graphs import steps
from makeready.graphs.plan.buckets import Shapes, Traffic
from makeready.graphs.plan.spec import CacheSpec, Field, Limits, StepSpec

if TYPE_CHECKING:
    from makeready.graphs.layers.inputs import Inputs
    from makeready.graphs.models.family import Model
    from makeready.graphs.planner.request import Request


@dataclass(frozen=True)
class Sizing:
    """What bounds a plan's steps of a kind, which is declared as ``step``, and their number."""

    limits: Limits
    max_decode_buckets: int
    max_extend_buckets: int
    row_counts: int
    traffic: Traffic
    step: StepSpec


class StepKind(Protocol):
    """A kind of step."""

    @property
    def name(self) -> str:
        """Key of ``Plan.steps``, and how the names of its buckets begin."""
        ...

    def spec(self, limits: Limits, request: Request, cache: CacheSpec) -> StepSpec | None:
        """The declaration; None where the request asks for no such steps.

        Args:
            cache: the model's; its groups have fields of their own.

        Raises:
            PlanError: what is asked for is beyond the limits.
        """
        ...

    def slot(self, limits: Limits, cache: CacheSpec) -> tuple[Field, ...]:
        """What a slot has to hold for steps of this kind; kinds share fields of a name."""
        ...

    def trace(
        self, model: Model, inputs: Inputs, limits: Limits, request: Request
    ) -> Mapping[str, torch.Tensor]:
        """Run the step on proxies, as contracts; the values of ``spec.results`` by name."""
        ...

    def shapes(self, sizing: Sizing) -> Shapes:
        """The batches to expect."""
        ...


Kind = TypeVar("Kind", bound=StepKind)

_KINDS: dict[str, StepKind] = {}


def step_kind(kind: Kind) -> Kind:
    """Register a kind of step; kinds are asked for their declaration in the order of their registration."""
    _KINDS[kind.name] = kind
    return kind


def step_kinds() -> dict[str, StepKind]:
    """Every kind of step, by name."""
    for module in sorted(m.name for m in pkgutil.iter_modules(steps.__path__)):
        importlib.import_module(f"{steps.__name__}.{module}")
    return dict(_KINDS)


def declare(
    limits: Limits, request: Request, cache: CacheSpec
) -> tuple[dict[str, StepSpec], tuple[Field, ...]]:
    """The kinds of step that ``request`` asks for, and the slot table that they share.

    Args:
        cache: the model's.

    Raises:
        PlanError: what is asked for is beyond the limits.
    """
    declared = {name: (kind, kind.spec(limits, request, cache)) for name, kind in step_kinds().items()}
    wanted = {name: spec for name, (_, spec) in declared.items() if spec is not None}
    slots: dict[str, Field] = {}
    for name in wanted:
        for one in declared[name][0].slot(limits, cache):
            known = slots.setdefault(one.name, one)
            assert known == one, f"kinds of step differ in the slot field {one.name}"
    return wanted, tuple(slots.values())
