"""What a family of models writes in a message, and the registry of families.

A family is a file beside this one, found by itself: ``@call_format`` over a function that reads calls, or
``reasoning_format``. Families from outside register the same way.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from makeready.engine.text.formats.rules import MessageRules, Rules
from makeready.engine.text.formats.source import BLANK, Step
from makeready.engine.text.parts import TextError

AUTO, NONE = "auto", "none"
# Texts that all stand in a chat template of the family; behind "!" those that stand in none.
Marks = tuple[str, ...]
Read = Callable[[Any, str], Step[None]]  # of a Scan, which knows this file


@dataclass(frozen=True)
class Reasoning:
    """How reasoning is written.

    Attributes:
        name: what options call it.
        opening, closing: the markers around it.
        told_by: sets of texts of which a chat template has one, see :data:`Marks`.
    """

    name: str
    opening: str
    closing: str
    told_by: tuple[Marks, ...]


@dataclass(frozen=True)
class Calls:
    """How tool calls are written.

    Attributes:
        name: what options call it.
        read: reads calls behind an opening marker, "" where they have none; what it leaves in
            ``scan.source.taken`` was none and is content.
        openings: markers that calls begin with.
        others: markers within and behind them.
        unmarked: characters that a message of nothing but calls may begin with.
        told_by: sets of texts of which a chat template has one, see :data:`Marks`.
        short_ids: a call's id has nine characters, as Mistral's templates want it.
        whole: reads the message as a whole, reasoning included, in place of the usual order.
        rules: of a grammar of calls, so that they can be forced; None where nobody wrote them.
        message_rules: the same of a message as a whole, for a family that reads it so.
        opened: for such a family, what of a message the end of a rendered prompt has already opened.
        reads_all_tokens: it is handed all special tokens, not its markers alone.
    """

    name: str
    read: Read
    openings: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    unmarked: str = ""
    told_by: tuple[Marks, ...] = ()
    short_ids: bool = False
    whole: bool = False
    rules: Rules | None = None
    message_rules: MessageRules | None = None
    opened: Callable[[str], str] | None = None
    reads_all_tokens: bool = False


@dataclass(frozen=True)
class Format:
    """How a model writes messages; what is None is not looked for."""

    reasoning: Reasoning | None = None
    calls: Calls | None = None
    # The family of calls whose messages are no others, whether calls are looked for or not.
    whole: Calls | None = None

    @property
    def markers(self) -> frozenset[str]:
        """All markers."""
        calls = self.calls or self.whole
        reasoning = (self.reasoning.opening, self.reasoning.closing) if self.reasoning else ()
        return frozenset((*reasoning, *(calls.openings + calls.others if calls else ())))

    @property
    def has_rules(self) -> bool:
        """Whether there are rules of its messages."""
        if self.whole is not None:
            return self.whole.message_rules is not None
        return self.calls is None or self.calls.rules is not None

    def without_calls(self) -> Format:
        """The same for a request without tools."""
        return replace(self, calls=None)

    def opened(self, prompt: str) -> str:
        """What of a message the end of a rendered prompt has already opened; "" for nothing."""
        if self.whole is not None and self.whole.opened is not None:
            return self.whole.opened(prompt)
        opening = self.reasoning.opening if self.reasoning else ""
        return opening if opening and prompt.rstrip(BLANK).endswith(opening) else ""


_CALLS: dict[str, Calls] = {}
_REASONING: dict[str, Reasoning] = {}


def call_format(
    name: str,
    *,
    openings: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
    unmarked: str = "",
    told_by: tuple[Marks, ...] = (),
    short_ids: bool = False,
    whole: bool = False,
    rules: Rules | None = None,
    message_rules: MessageRules | None = None,
    opened: Callable[[str], str] | None = None,
) -> Callable[[Read], Read]:
    """Register a function as what reads a family's calls; see :class:`Calls`.

    Raises:
        ValueError: the name is taken.
    """

    def register(read: Read) -> Read:
        if name in (*_CALLS, AUTO, NONE):
            raise ValueError(f"there is a call format {name} already; take another name")
        _CALLS[name] = Calls(
            name, read, openings, others, unmarked, told_by, short_ids, whole, rules, message_rules, opened
        )
        _told.cache_clear()
        return read

    return register


def reasoning_format(name: str, opening: str, closing: str, told_by: tuple[Marks, ...]) -> None:
    """Register how a family writes reasoning; see :class:`Reasoning`.

    Raises:
        ValueError: the name is taken.
    """
    if name in (*_REASONING, AUTO, NONE):
        raise ValueError(f"there is a reasoning format {name} already; take another name")
    _REASONING[name] = Reasoning(name, opening, closing, told_by)
    _told.cache_clear()


def call_formats() -> tuple[str, ...]:
    """What the option ``tool_call_parser`` may be."""
    _find()
    return (AUTO, NONE, *sorted(_CALLS))


def reasoning_formats() -> tuple[str, ...]:
    """What the option ``reasoning_parser`` may be."""
    _find()
    return (AUTO, NONE, *sorted(_REASONING))


def check_parsers(tool_call_parser: str, reasoning_parser: str) -> None:
    """Whether there are such formats, and whether they go together.

    Raises:
        TextError: names the option and what it may be.
    """
    for option, name, known in (
        ("tool_call_parser", tool_call_parser, call_formats()),
        ("reasoning_parser", reasoning_parser, reasoning_formats()),
    ):
        if name not in known:
            raise TextError(f"{option}={name!r} is no format; it is one of {', '.join(known)}")
    named = {tool_call_parser, reasoning_parser} - {AUTO, NONE}
    if len(named) > 1 and any(name in _CALLS and _CALLS[name].whole for name in named):
        raise TextError(
            f"tool_call_parser={tool_call_parser} and reasoning_parser={reasoning_parser} are two ways of writing a "
            "whole message; leave one of them out"
        )


def format_of(
    template: str | None,
    tool_call_parser: str = AUTO,
    reasoning_parser: str = AUTO,
    own: Format | None = None,
) -> Format:
    """The format of messages under a chat template.

    Args:
        template: its text.
        tool_call_parser, reasoning_parser: a name in place of what the template tells, or ``none``.
        own: what the checkpoint itself says, which holds where no family of calls is told or named.

    Raises:
        TextError: as :func:`check_parsers`.
    """
    check_parsers(tool_call_parser, reasoning_parser)
    told = _told(template or "")
    if own is not None and told.calls is None and {tool_call_parser, reasoning_parser} <= {AUTO, NONE}:
        return Format(
            own.reasoning if reasoning_parser == AUTO else None,
            own.calls if tool_call_parser == AUTO else None,
            own.whole,
        )
    calls = told.calls if tool_call_parser == AUTO else _CALLS.get(tool_call_parser)
    reasoning = told.reasoning if reasoning_parser == AUTO else _REASONING.get(reasoning_parser)
    whole = calls or _CALLS.get(reasoning_parser) or told.calls
    if whole is None or not whole.whole:
        return Format(reasoning, calls)
    if reasoning_parser == AUTO:
        reasoning = _REASONING.get(whole.name)
    return Format(reasoning, calls, whole)


@lru_cache(maxsize=64)
def _told(template: str) -> Format:
    """What a template's text tells: of the families whose marks are all there, the one with most of them."""
    _find()
    scores = {each: _score(each.told_by, template) for each in (*_CALLS.values(), *_REASONING.values())}
    calls = max(_CALLS.values(), key=lambda each: scores[each], default=None)
    reasoning = max(_REASONING.values(), key=lambda each: scores[each], default=None)
    return Format(
        reasoning if reasoning and scores[reasoning] else None, calls if calls and scores[calls] else None
    )


def _score(told_by: Sequence[Marks], template: str) -> int:
    def told(mark: str) -> bool:
        return mark[1:] not in template if mark.startswith("!") else mark in template

    return max((len(marks) for marks in told_by if all(map(told, marks))), default=0)


@cache
def _find() -> None:
    """Import the families."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
