"""Where guesses come from: one module a method of speculative decoding.

A module of this folder registers its method with :func:`method`; modules are found by themselves. Steps that verify
ask the method that a plan is compiled for, and know none by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import torch

from makeready.graphs import speculative
from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.paired import FIELD
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.models.family import Model
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import Limits
from makeready.graphs.plan.speculative import Speculative

if TYPE_CHECKING:
    from makeready.graphs.planner.request import Request


class Guesses(NamedTuple):
    """Rows with their drafts, packed; see :func:`makeready.kernels.step.draft.draft_ngram`."""

    draft_ids: torch.Tensor
    draft_start: torch.Tensor
    draft_len: torch.Tensor
    draft_slot: torch.Tensor
    draft_context: torch.Tensor


@dataclass(frozen=True)
class Setting:
    """What a method knows of the plan when models are built.

    Attributes:
        activation: dtype of everything between the embedding and the logits.
    """

    checkpoint: Checkpoint
    request: Request
    limits: Limits
    activation: str


class Method(Protocol):
    """A way to guess tokens."""

    @property
    def name(self) -> str:
        """``speculative.method``."""
        ...

    @property
    def own(self) -> tuple[str, ...]:
        """Fields of :class:`Speculative` that are of use to it, and not to all."""
        ...

    @property
    def second(self) -> bool:
        """Whether it guesses with a second checkpoint."""
        ...

    def check(self, asked: Speculative) -> None:
        """Look at its own fields.

        Raises:
            PlanError: they cannot be.
        """
        ...

    def model(self, target: Model, setting: Setting) -> Model:
        """What steps run: ``target``, and whatever has to follow its tokens so as to guess the next.

        Raises:
            PlanError: the models do not go together.
        """
        ...

    def guess(self, model: Model, inputs: Inputs, limits: Limits, asked: Speculative) -> Guesses:
        """Guess what follows every row's last token, as contracts, before ``model`` runs it."""
        ...


Made = TypeVar("Made", bound=Method)

_METHODS: dict[str, Method] = {}


def method(made: Made) -> Made:
    """Register a method."""
    _METHODS[made.name] = made
    return made


def methods() -> dict[str, Method]:
    """Every method, by name."""
    for module in sorted(m.name for m in pkgutil.iter_modules(speculative.__path__)):
        importlib.import_module(f"{speculative.__name__}.{module}")
    return dict(sorted(_METHODS.items()))


def guessing(target: Model, setting: Setting) -> Model:
    """The model that steps run under what ``setting`` asks for.

    Raises:
        PlanError: the method is unknown, lacks a second checkpoint, or has one that is of no use.
    """
    name, second = setting.request.speculative.method, FIELD in setting.checkpoint.config
    found = None if name is None else known(name)
    if second and not (found and found.second):
        raise PlanError(
            "speculative.checkpoint is of no use "
            + (
                "without a method; add speculative.method=draft"
                if found is None
                else f"to {name}; leave it out"
            )
        )
    if found is None:
        return target
    if found.second and not second:
        raise PlanError(
            f"speculative.method={name} guesses with a second model; add speculative.checkpoint=PATH"
        )
    return found.model(target, setting)


def known(name: str) -> Method:
    """The method of that name.

    Raises:
        PlanError: there is none.
    """
    found = methods().get(name)
    if found is None:
        raise PlanError(
            f"speculative.method={name} is not built; choose {', '.join(methods())}, or null for none"
        )
    return found
