"""One answer's message, read while it is written.

The usual order is reasoning, then content with calls in it. A marker counts as one only where a call follows it:
what cannot be read stays content, marker included, and nothing that was told is taken back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from makeready.engine.message import ARGUMENTS, CONTENT, DONE, NAME, REASONING, Event, joined
from makeready.engine.text.formats.base import Format
from makeready.engine.text.formats.cast import Tools
from makeready.engine.text.formats.source import BLANK, Source, Step, Token

if TYPE_CHECKING:
    from makeready.engine.text.message_grammar import MessageGrammar

_FENCE = re.compile(r" {0,3}(`{3,})([^`]*)$")
LONGEST_LINE = 200  # characters of a line that is looked at for a code fence


@dataclass(frozen=True)
class Reading:
    """How the answers to a request are to be read.

    Attributes:
        format: how the model writes; without calls where no tool may be called.
        tools: of the request, for the types of arguments.
        opened: what of the message the prompt has already opened.
        parallel: whether there may be several calls; else the first one ends the answer.
        grammar: what the whole message has to be; None where nobody knows.
    """

    format: Format
    tools: Sequence[Any] = ()
    opened: str = ""
    parallel: bool = True
    grammar: MessageGrammar | None = None


class EnoughError(Exception):
    """The one call that was wanted is complete."""


class Region:
    """Content or reasoning as it goes on: without the white space that stands between it and a marker."""

    def __init__(self, tell: Callable[[str], None], fresh: bool = False) -> None:
        self._tell, self._fresh = tell, fresh
        self._blanks: list[str] = []
        self._begun = False

    def write(self, text: str) -> None:
        """More of it; white space waits for what it stands before."""
        kept = text.rstrip(BLANK)
        if not kept:
            self._blanks.append(text)
            return
        shown = "".join((*self._blanks, kept))
        self._blanks = [text[len(kept) :]]
        if self._fresh:
            shown = shown.lstrip("\r\n")
            if self._begun:  # what a call came between does not run together
                shown = f"\n{shown}"
        self._begun, self._fresh = True, False
        self._tell(shown)

    def border(self) -> None:
        """A marker comes here."""
        self._blanks, self._fresh = [], True

    def end(self) -> None:
        """The answer ends here."""
        if not self._fresh and (blanks := "".join(self._blanks)):
            self._tell(blanks)


class Fence:
    """Whether a text is inside a block of code between lines of backticks."""

    def __init__(self) -> None:
        self._line, self._open = "", 0

    @property
    def open(self) -> bool:
        """Whether it is."""
        return self._open > 0

    def take(self, text: str) -> None:
        """The text goes on."""
        *lines, rest = text.split("\n")
        for line in lines:
            self._end(self._line + line)
            self._line = ""
        self._line += rest[: max(0, LONGEST_LINE - len(self._line))]

    def _end(self, line: str) -> None:
        found = _FENCE.match(line)
        if found is None:
            return
        ticks = len(found[1])
        if not self._open:
            self._open = ticks
        elif ticks >= self._open and not found[2].strip():
            self._open = 0


class Call:
    """A call while it is read; it is told with the first of its arguments.

    Attributes:
        name: None until it is known; arguments wait for it.
        whole: whether its arguments were read to their end.
    """

    def __init__(self, scan: Scan, name: str | None = None) -> None:
        self.name, self.whole = name, False
        self._scan, self._kept = scan, list[str]()
        self._number = -1

    @property
    def begun(self) -> bool:
        """Whether it was told."""
        return self._number >= 0

    def write(self, text: str) -> None:
        """More of its arguments."""
        if self.name is None:
            self._kept.append(text)
            return
        if not self.begun:
            self._number = self._scan.begin(self.name)
        text = "".join((*self._kept, text))
        self._kept.clear()
        if text:
            self._scan.tell(Event(ARGUMENTS, text, self._number))
        self._scan.accept()

    def cut(self) -> Step[None]:
        """It cannot be read on; where the answer ends here, it stays as it stands."""
        if self.name is not None and not self.begun and not (yield from self._scan.source.peek()):
            self.write("")

    def finish(self) -> None:
        """All was read; without arguments they are an empty object.

        Raises:
            EnoughError: and no other is wanted.
        """
        if not self.begun:
            self.write("" if self.whole else "{}")
        self._scan.open = False
        self._scan.tell(Event(DONE, call=self._number))
        if not self._scan.reading.parallel:
            raise EnoughError


@dataclass
class Scan:
    """What families read from and tell to."""

    reading: Reading
    source: Source
    name_id: Callable[[int, str], str]
    tools: Tools = field(init=False)
    events: list[Event] = field(default_factory=list)
    calls: int = 0
    open: bool = False  # a call has begun and is not complete

    def __post_init__(self) -> None:
        self.tools = Tools(self.reading.tools)
        self.content = Region(lambda text: self.tell(Event(CONTENT, text)))
        self.reasoning = Region(lambda text: self.tell(Event(REASONING, text)), fresh=True)
        self.fence = Fence()

    def tell(self, event: Event) -> None:
        """A piece is final."""
        self.events.append(event)

    def begin(self, name: str) -> int:
        """A call begins; returns its number."""
        self.content.border()
        number, self.calls, self.open = self.calls, self.calls + 1, True
        self.tell(Event(NAME, name, number, self.name_id(number, name)))
        return number

    def accept(self) -> None:
        """What was taken is accounted for."""
        self.source.taken.clear()

    def write(self, region: Region) -> None:
        """What was taken is a region's."""
        text = "".join(self.source.taken)
        if region is self.content:
            self.fence.take(text)
        region.write(text)
        self.accept()

    def leave(self) -> Step[None]:
        """What was taken and is no call is content, unless the answer ends within a call."""
        ends = not (yield from self.source.peek())
        if ends and self.open:
            self.accept()
        elif self.source.taken:
            self.write(self.content)
        self.open = False

    def next_is(self, character: str) -> Step[bool]:
        """Whether this comes next, behind blanks, which are taken."""
        yield from self.source.blanks()
        return (yield from self.source.peek()) == character

    def close(self, *markers: str) -> Step[None]:
        """Take what stands behind a call, as far as it is there or the answer ends in it."""
        for marker in markers:
            yield from self.source.blanks()
            yield from self.source.match((marker,), cut=True)
        self.accept()

    def text(self, region: Region, markers: Sequence[str], *, fenced: bool = False) -> Step[str]:
        """Write text up to a marker, which is taken but not accounted for; "" at the end.

        Args:
            fenced: in a block of code nothing is a marker but a special token.
        """
        source = self.source
        plain = re.compile(f"[^{re.escape(''.join({marker[0] for marker in markers}))}\\n]+")
        while head := (yield from source.peek()):
            if isinstance(head, Token):
                source.take()
                if head in markers:
                    return str(head)
            elif not source.run(plain):
                inside = fenced and self.fence.open
                if not inside and (found := (yield from source.match(markers))):
                    return found
                source.take()
            self.write(region)
        return ""


def read_message(scan: Scan) -> Step[None]:
    """Reasoning, then content with calls in it."""
    source, reasoning, calls = scan.source, scan.reading.format.reasoning, scan.reading.format.calls
    if reasoning is not None:
        opened = bool(scan.reading.opened)
        if not opened:
            yield from source.blanks()
            opened = bool((yield from source.match((reasoning.opening,))))
        if opened:
            scan.accept()
            if (yield from scan.text(scan.reasoning, (reasoning.closing,))):
                scan.accept()
                scan.reasoning.border()
                scan.content.border()
    if calls is not None and calls.unmarked:
        yield from source.blanks()
        if (head := (yield from source.peek())) and head in calls.unmarked:
            yield from calls.read(scan, "")
    yield from scan.leave()
    openings = calls.openings if calls else ()
    while opening := (yield from scan.text(scan.content, openings, fenced=True)):
        if calls is not None:
            yield from calls.read(scan, opening)
        yield from scan.leave()


class Scanner:
    """Reads one answer.

    Args:
        reading: what to read, and how.
        tokens: special tokens of the tokenizer.
        hides: whether special tokens that are no markers are left out.
        name_id: makes the id of a call from its number and name.

    Attributes:
        full: the answer has all calls that it may have; what comes behind is not read.
    """

    def __init__(
        self,
        reading: Reading,
        tokens: frozenset[str] = frozenset(),
        hides: bool = True,
        name_id: Callable[[int, str], str] = lambda number, name: f"call_{number}",
    ) -> None:
        self.full = False
        self._hides = hides
        self._markers = reading.format.markers
        self._scan = Scan(reading, Source(self._markers & tokens, hides), name_id)
        whole = reading.format.whole
        self._all_tokens = whole is not None and whole.reads_all_tokens
        self._work = read_message(self._scan) if whole is None else whole.read(self._scan, reading.opened)
        self._go_on()

    def feed(self, text: str) -> list[Event]:
        """The next piece of text, or a special token as :class:`Token`; returns what became final."""
        if isinstance(text, Token) and text not in self._markers and not self._all_tokens:
            text = "" if self._hides else str(text)
        if text:
            self._scan.source.put(text)
            self._go_on()
        return self._told()

    def end(self) -> list[Event]:
        """The answer has ended; returns what was held back."""
        self._scan.source.end()
        self._go_on()
        self._scan.reasoning.end()
        self._scan.content.end()
        return self._told()

    def _go_on(self) -> None:
        try:
            next(self._work)
        except StopIteration:
            return
        except EnoughError:
            self.full = True

    def _told(self) -> list[Event]:
        events, self._scan.events = joined(self._scan.events), []
        return events
