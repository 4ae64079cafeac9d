"""What a kind of step is to the engine: which batches it takes, how they are staged, what comes back.

A module of this folder registers kinds with :func:`step_kind`; modules are found by themselves. Its twin of
the same name in ``graphs/steps/`` declares the fields.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np

from makeready.engine import steps
from makeready.engine.batch import Batch
from makeready.engine.request import Request, TokenLogprob
from makeready.engine.seats import Seats

if TYPE_CHECKING:
    from makeready.engine.staging import Stage


class StepKind(Protocol):
    """A kind of step."""

    @property
    def name(self) -> str:
        """Key of ``Plan.steps``."""
        ...

    @property
    def order(self) -> int:
        """Kinds are asked in this order whether they take a batch."""
        ...

    @property
    def least(self) -> int:
        """Tokens by which a step lengthens a generating row, at least.

        Where it is not :attr:`most`, only the device knows, and the host learns it when results are read:
        see :meth:`counts`.
        """
        ...

    @property
    def most(self) -> int:
        """Tokens by which a step lengthens a generating row, at most."""
        ...

    def takes(self, batch: Batch) -> bool:
        """Whether such a step can run the batch."""
        ...

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        """Write the step's fields."""
        ...

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Tokens by which each generating row was lengthened; None where ``least`` and ``most`` say it."""
        ...

    def commit(
        self, batch: Batch, results: Mapping[str, np.ndarray], void: Collection[Request]
    ) -> Iterator[Sampled]:
        """Sampled tokens in order, and whose they are; other results are given to their requests on the way.

        Args:
            void: requests that were sent back after the step was launched, which want nothing of it.
        """
        ...


Sampled: TypeAlias = "tuple[Request, int | str, TokenLogprob | None]"
"""A request, its token and what was asked of it; a text in the token's place says what was not finite."""

Kind = TypeVar("Kind", bound=StepKind)

_KINDS: dict[str, StepKind] = {}


def step_kind(kind: Kind) -> Kind:
    """Register a kind of step."""
    _KINDS[kind.name] = kind
    return kind


def step_kinds(names: Collection[str]) -> list[StepKind]:
    """The kinds of these names, in the order in which they are asked to take a batch."""
    for module in pkgutil.iter_modules(steps.__path__):
        importlib.import_module(f"{steps.__name__}.{module.name}")
    return sorted((_KINDS[name] for name in names), key=lambda kind: kind.order)
