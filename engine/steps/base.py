"""What a kind of step is to the engine: which tokens it takes, how they are staged, what comes back.

A module of this folder registers kinds with :func:`step_kind`; modules are found by themselves. Its twin of
the same name in ``graphs/steps/`` declares the fields.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np

from makeready.engine import steps
from makeready.engine.batch import Batch, Chunk
from makeready.engine.output import TokenLogprob
from makeready.engine.seats import Seats
from makeready.engine.sequence import TokenSequence

if TYPE_CHECKING:
    from makeready.engine.staging import Stage


class Report(NamedTuple):
    """What a step says of the token at a place of a sequence's prompt or output."""

    sequence: TokenSequence
    place: int
    logprob: TokenLogprob


class StepKind(Protocol):
    """A kind of step."""

    @property
    def name(self) -> str:
        """Key of ``Plan.steps``."""
        ...

    @property
    def order(self) -> int:
        """Kinds are asked in this order whether they take a batch; the last takes any."""
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

    def claims(self, sequence: TokenSequence) -> int | None:
        """The first of a sequence's tokens that has to run in such a step; None if none has."""
        ...

    def launched(self, chunk: Chunk) -> None:
        """Such a step runs a chunk that it claimed, or is sure to."""
        ...

    def takes(self, chunks: list[Chunk]) -> bool:
        """Whether such a step can run these chunks, which no kind claims, beside generating rows."""
        ...

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        """Write the step's fields."""
        ...

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Tokens by which each generating row was lengthened; None where ``least`` and ``most`` say it."""
        ...

    def tokens(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Iterable[tuple[TokenSequence, int]]:
        """Sampled tokens in order, and whose they are; below 0 where the logits were not finite."""
        ...

    def reports(
        self, batch: Batch, results: Mapping[str, np.ndarray], wanted: Collection[TokenSequence]
    ) -> Iterator[Report]:
        """Log-probabilities of tokens, in order, of the sequences that want them; NaN where they are none.

        Those of output are of the tokens that the step sampled, which are not taken in yet.
        """
        ...


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
