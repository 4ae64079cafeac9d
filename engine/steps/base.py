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
from makeready.graphs.plan.spec import StepSpec

if TYPE_CHECKING:
    from makeready.engine.staging import Stage


class Report(NamedTuple):
    """What a step says of the token at a place of a sequence's prompt or output."""

    sequence: TokenSequence
    place: int
    logprob: TokenLogprob


class Drafts(NamedTuple):
    """For each generating row of a step, tokens that were guessed, and how many of the first of them were right."""

    drafted: list[int]
    accepted: list[int]


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

    @property
    def each(self) -> int:
        """Tokens that the step has room for in each generating row."""
        ...

    @property
    def reads_history(self) -> bool:
        """Whether such steps look at all tokens of a sequence, those found in the prefix cache among them."""
        ...

    @property
    def forces(self) -> bool:
        """Whether rows under a constraint may go on with other tokens than those that such a step samples next."""
        ...

    def of(self, step: StepSpec, *, always: bool = False) -> StepKind:
        """The kind as a plan declares it, for one scheduler.

        Args:
            always: take every batch that can be taken, also where another kind should be faster.
        """
        ...

    def claims(self, sequence: TokenSequence) -> int | None:
        """The first of a sequence's tokens that has to run in such a step; None if none has."""
        ...

    def launched(self, chunk: Chunk) -> None:
        """Such a step runs a chunk that it claimed, or is sure to."""
        ...

    def takes(self, decoding: list[TokenSequence], chunks: list[Chunk]) -> bool:
        """Whether such a step can run these chunks, which no kind claims, beside generating rows."""
        ...

    def stage(self, batch: Batch, seats: Seats, stage: Stage) -> None:
        """Write the step's fields."""
        ...

    def counts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Tokens by which each generating row was lengthened; None where ``least`` and ``most`` say it."""
        ...

    def learned(self, decoding: list[TokenSequence], counts: np.ndarray) -> None:
        """What :meth:`counts` said of a step's generating rows."""
        ...

    def drafts(self, batch: Batch, results: Mapping[str, np.ndarray]) -> Drafts | None:
        """What was guessed; None where nothing ever is."""
        ...

    def guesses(self, batch: Batch, early: Mapping[str, np.ndarray]) -> list[list[int]] | None:
        """What was guessed for each generating row, by results that are there early; None where nothing ever is."""
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


def step_kinds(declared: Mapping[str, StepSpec], *, always: bool = False) -> list[StepKind]:
    """The kinds of a plan, in the order in which they are asked to take a batch; see :meth:`StepKind.of`."""
    for module in pkgutil.iter_modules(steps.__path__):
        importlib.import_module(f"{steps.__name__}.{module.name}")
    return sorted(
        (_KINDS[name].of(step, always=always) for name, step in declared.items()), key=lambda kind: kind.order
    )
