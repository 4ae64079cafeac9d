"""Text and special tokens as a scanner reads them: one after the other, waited for where they are not there yet.

Whoever reads is a generator, which yields to wait. What it decides follows from the characters and never from where
a piece of text ended, so it reads the same however a text was cut.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Generator
from typing import TypeVar

T = TypeVar("T")
Step = Generator[None, None, T]  # work that may have to wait for more text

BLANK = " \t\r\n"
_BLANKS = re.compile(f"[{BLANK}]+")


class Token(str):
    """A special token, which is one item whatever its text."""

    __slots__ = ()


class Source:
    """What was put in and is not read yet.

    Args:
        tokens: markers that the model writes as special tokens: the same text in ordinary ones is none.
        hides: leave special tokens out of what was :attr:`taken`.

    Attributes:
        taken: what was read since somebody cleared it: text that nobody accounted for yet.
        hides: see above.
    """

    def __init__(self, tokens: Collection[str] = (), hides: bool = True) -> None:
        self.taken: list[str] = []
        self._tokens, self.hides = frozenset(tokens), hides
        self._pieces: deque[str] = deque()
        self._at = 0  # in the first piece
        self._ended = False

    def put(self, piece: str) -> None:
        """More text, or a :class:`Token`."""
        last = self._pieces[-1] if self._pieces else None
        if isinstance(piece, Token) or last is None or isinstance(last, Token):
            self._pieces.append(piece)
        else:
            first = len(self._pieces) == 1
            self._pieces[-1] = (last[self._at :] if first else last) + piece
            self._at = 0 if first else self._at

    def end(self) -> None:
        """Nothing comes any more."""
        self._ended = True

    def peek(self) -> Step[str]:
        """The next character or token, which stays; "" at the end."""
        while not self._pieces:
            if self._ended:
                return ""
            yield
        first = self._pieces[0]
        return first if isinstance(first, Token) else first[self._at]

    def take(self, count: int = 1) -> str:
        """So many characters, or the token, that are there."""
        first = self._pieces[0]
        if isinstance(first, Token):
            self._pieces.popleft()
            if not self.hides:
                self.taken.append(str(first))
            return first
        text = first[self._at : self._at + count]
        self._at += len(text)
        if self._at == len(first):
            self._pieces.popleft()
            self._at = 0
        self.taken.append(text)
        return text

    def run(self, pattern: re.Pattern[str]) -> str:
        """What of the text that is there matches a pattern, taken; "" for nothing."""
        if not self._pieces or isinstance(self._pieces[0], Token):
            return ""
        found = pattern.match(self._pieces[0], self._at)
        return self.take(len(found[0])) if found is not None and found[0] else ""

    def word(self, pattern: re.Pattern[str]) -> Step[str]:
        """All characters up to one that does not match; the pattern is one of single characters, repeated."""
        made: list[str] = []
        while (yield from self.peek()) and (part := self.run(pattern)):
            made.append(part)
        return "".join(made)

    def blanks(self) -> Step[str]:
        """Spaces and newlines, as many as come."""
        return (yield from self.word(_BLANKS))

    def match(self, markers: Collection[str], *, take: bool = True, cut: bool = False) -> Step[str]:
        """The marker that comes next, the longest of several; "" for none.

        Args:
            take: else it stays.
            cut: the beginning of one counts, too, where the text ends in it.
        """
        texts = [marker for marker in markers if marker not in self._tokens]
        most = max(map(len, texts), default=0)
        while True:
            first = self._pieces[0] if self._pieces else ""
            if isinstance(first, Token):
                found = str(first) if str(first) in markers else ""
                break
            rest = first[self._at : self._at + most]
            longer = any(len(text) > len(rest) and text.startswith(rest) for text in texts)
            found = max((text for text in texts if rest.startswith(text)), key=len, default="")
            last = len(self._pieces) <= 1
            if (self._ended or not last) or (first and not longer):
                if cut and longer and rest and last and not found:
                    found = rest
                break
            yield
        if found and take:
            self.take(len(found))
        return found


def ended(reading: Step[T]) -> T:
    """What is read of a source that has ended, which nobody waits for."""
    try:
        next(reading)
    except StopIteration as done:
        return done.value
    raise AssertionError("what has ended is not waited for")
