"""What the parts of a batch job hand to each other."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from makeready.engine.output import Output
from makeready.engine.protocol.asked import Ask, AskError
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.tokenizer import Tokenizer

# A row with its number, which counts from 1: the bytes of a line, or what a table's row holds.
Numbered = tuple[int, "bytes | dict[str, Any] | Damaged"]


class JobError(ValueError):
    """A batch job cannot begin or go on; the message says what is left where, and the remedy."""


class RowError(AskError):
    """One row cannot be read; the message names the field and the remedy."""


@dataclass(frozen=True)
class Damaged:
    """A table's row of which a cell cannot be read.

    Attributes:
        fields: the others.
        reason: names the cell and what is wrong with it.
    """

    fields: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Done:
    """A row that is final.

    Attributes:
        number: the row's.
        answer: a JSON object in one line, without its end.
        failed: whether the answer is an error.
        prompt_tokens: tokens of its prompts, each counted once a sample.
        cached_tokens: those of them that were found in the prefix cache.
        output_tokens: tokens generated.
    """

    number: int
    answer: bytes
    failed: bool
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Format(Protocol):
    """How rows say what they ask for, and what they come to. Both work on parsed JSON objects."""

    name: str

    def read(self, fields: Mapping[str, Any]) -> Ask:
        """The request of a row; raises :class:`AskError`."""
        ...

    def answer(
        self,
        fields: Mapping[str, Any],
        outputs: Sequence[Output],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        number: int,
    ) -> dict[str, Any]:
        """What its samples came to: those of the first prompt, then those of the next."""
        ...

    def refusal(
        self, fields: Mapping[str, Any], message: str, field: str | None, number: int
    ) -> dict[str, Any]:
        """What a row that cannot be served comes to; ``fields`` is empty where it is no object."""
        ...


def optional(module: str, extra: str, purpose: str) -> Any:
    """A module of an extra.

    Raises:
        JobError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise JobError(
            f"{purpose} needs {package}; install it with pip install 'makeready[{extra}]'"
        ) from None
