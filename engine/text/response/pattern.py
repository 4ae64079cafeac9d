"""Delimiters that are regular expressions, found in a text that is still being written.

A backtracking engine cannot say whether more text would change what it found. Here all ways to match go side by
side, in the order in which a backtracking engine prefers them (R. Cox, "Regular Expression Matching: the Virtual
Machine Approach"), one character after the other: a match is final once no way that is preferred to it is left. So it
does not matter how a text is cut, and time grows with the text alone.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from makeready.engine.text.parts import TextError

if sys.version_info >= (3, 11):
    from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import sre_parse as parser

MOST_STEPS = 2000  # of a program; the longest delimiters known have some hundred

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda char: char.isalnum() or char == "_",
}
_REFUSED = {
    **dict.fromkeys(("ASSERT", "ASSERT_NOT"), "a look around that is not a look ahead at its end"),
    "AT": "a word boundary",
    **dict.fromkeys(("GROUPREF", "GROUPREF_EXISTS"), "a reference to a group"),
    **dict.fromkeys(("ATOMIC_GROUP", "POSSESSIVE_REPEAT"), "what matches at once or not at all"),
}
Groups = tuple[tuple[int, int], ...]  # slots and where in the text they were passed; later ones win


@dataclass(frozen=True)
class _Step:
    """One step of a program.

    Attributes:
        kind: ``char``; ``split``, to several steps, best first; ``save`` of a place; ``end`` and ``begin`` of the
            text; ``match``.
        test: of a character.
        char: the only one that passes, where there is one alone.
        to: the steps that follow, for ``split``.
        slot: of ``save``.
    """

    kind: str
    test: Callable[[str], bool] | None = None
    char: str = ""
    to: tuple[int, ...] = ()
    slot: int = 0


@dataclass(frozen=True)
class Found:
    """A match: where it begins and ends in the text, and its named groups."""

    start: int
    end: int
    groups: Mapping[str, tuple[int, int]]


class Pattern:
    """A regular expression as Python's ``re`` has them, in which a dot matches newlines as well.

    Attributes:
        first: a character that a match may begin with; None where it may be any.

    Raises:
        TextError: it is broken, too large, or looks at text in a way that is not followed here.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            tree: Any = parser.parse(re.sub(r"\(\?<(?=[^=!])", "(?P<", source), re.DOTALL)
        except (re.error, RecursionError, OverflowError) as error:
            raise TextError(f"pattern {source!r} is no regular expression ({error}); correct it") from None
        if tree.state.flags & ~(re.DOTALL | re.UNICODE):
            raise self._refusal("flags")
        self.names: dict[str, int] = dict(tree.state.groupdict)
        self._code: list[_Step] = []
        self._sequence(tree, last=True)
        self._add("match")
        self.code = tuple(self._code)
        firsts = self._firsts()
        self.first = None if firsts is None else re.compile(f"[{re.escape(''.join(sorted(firsts)))}]")

    def last(self, text: str) -> Found | None:
        """The last of the matches in a text, one behind the other."""
        last, at = None, 0
        while at <= len(text) and (found := self._from(text, at)) is not None:
            last, at = found, max(found.end, found.start + 1)
        return last

    def _from(self, text: str, at: int) -> Found | None:
        search = Search(self, at)
        while at < len(text) and not search.final:
            if search.idle:
                at = self.next(text, at)
                search.skip(at)
                if at == len(text):
                    break
            search.take(text[at])
            at += 1
        if not search.final:
            search.end()
        return search.found

    def next(self, text: str, at: int) -> int:
        """Where a match may begin, from a place on; the end if nowhere."""
        if self.first is None:
            return at
        found = self.first.search(text, at)
        return len(text) if found is None else found.start()

    def _firsts(self) -> set[str] | None:
        """All characters that a match may begin with; None where they cannot be listed."""
        steps, seen, made = [0], set[int](), set[str]()
        while steps:
            step = steps.pop()
            if step in seen:
                continue
            seen.add(step)
            code = self.code[step]
            if code.kind in ("split", "save"):
                steps += code.to or (step + 1,)
            elif code.kind == "char" and code.char:
                made.add(code.char)
            else:
                return None
        return made

    def _add(self, kind: str, **more: Any) -> int:
        if len(self._code) >= MOST_STEPS:
            raise TextError(f"pattern {self.source!r} is too large; lower what its repetitions count")
        self._code.append(_Step(kind, **more))
        return len(self._code) - 1

    def _refusal(self, what: str) -> TextError:
        return TextError(f"pattern {self.source!r} has {what}, which is not followed; write it without")

    def _sequence(self, items: Any, *, last: bool) -> None:
        items = list(items)
        for place, (op, value) in enumerate(items):
            self._item(str(op), value, last=last and place == len(items) - 1)

    def _item(self, op: str, value: Any, *, last: bool) -> None:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            self._add("char", test=_test(op, value), char=chr(value) if op == "LITERAL" else "")
        elif op == "BRANCH":
            self._branches(value[1], last=last)
        elif op == "SUBPATTERN":
            number, added, removed, inner = value
            if added or removed:
                raise self._refusal("flags")
            if number is not None:
                self._add("save", slot=2 * number)
            self._sequence(inner, last=last)
            if number is not None:
                self._add("save", slot=2 * number + 1)
        elif op in ("MAX_REPEAT", "MIN_REPEAT"):
            self._repeat(*value, greedy=op == "MAX_REPEAT")
        elif op == "ASSERT" and value[0] == 1 and last:
            self._add("save", slot=1)  # the match ends here, what follows only has to be there
            self._sequence(value[1], last=False)
        elif op == "AT" and str(value) in ("AT_END", "AT_END_STRING"):
            self._add("end")
        elif op == "AT" and str(value) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            self._add("begin")
        else:
            raise self._refusal(_REFUSED.get(op, op.lower()))

    def _branches(self, branches: Any, *, last: bool) -> None:
        head = self._add("split")
        starts, ends = list[int](), list[int]()
        for branch in branches:
            starts.append(len(self._code))
            self._sequence(branch, last=last)
            ends.append(self._add("split"))
        self._code[head] = _Step("split", to=tuple(starts))
        for end in ends:
            self._code[end] = _Step("split", to=(len(self._code),))

    def _repeat(self, least: int, most: Any, inner: Any, *, greedy: bool) -> None:
        def fork(at: int, into: int, past: int) -> None:
            self._code[at] = _Step("split", to=(into, past) if greedy else (past, into))

        for _ in range(least):
            self._sequence(inner, last=False)
        if most is parser.MAXREPEAT:
            at = self._add("split")
            self._sequence(inner, last=False)
            self._add("split", to=(at,))
            fork(at, at + 1, len(self._code))
            return
        forks = list[int]()
        for _ in range(least, int(most)):
            forks.append(self._add("split"))
            self._sequence(inner, last=False)
        for at in forks:
            fork(at, at + 1, len(self._code))


def _test(op: str, value: Any) -> Callable[[str], bool]:
    if op == "ANY":
        return lambda char: True
    if op == "LITERAL":
        return chr(value).__eq__
    if op == "NOT_LITERAL":
        return chr(value).__ne__
    items = [(str(name), each) for name, each in value]
    negated = items[0][0] == "NEGATE"
    tests = [_of_class(name, each) for name, each in items[negated:]]
    return lambda char: any(test(char) for test in tests) != negated


def _of_class(name: str, value: Any) -> Callable[[str], bool]:
    if name == "RANGE":
        return lambda char: value[0] <= ord(char) <= value[1]
    if name == "CATEGORY":
        kind = str(value).removeprefix("CATEGORY_")
        test = _CATEGORIES[kind.removeprefix("NOT_")]
        return (lambda char: not test(char)) if kind.startswith("NOT_") else test
    return chr(value).__eq__


@dataclass(frozen=True)
class _Way:
    """A way to match that has come to a step which wants more text."""

    step: int
    start: int
    places: Groups


class Search:
    """Looks for a pattern from a place of a text on.

    Args:
        at: the place; the text before it is not looked at.

    Attributes:
        found: the match that is preferred so far.
    """

    def __init__(self, pattern: Pattern, at: int) -> None:
        self.found: Found | None = None
        self.pattern, self._at = pattern, at
        self._ways: list[_Way] = []
        self._begin(at)

    @property
    def final(self) -> bool:
        """Whether no further text can change what was found."""
        return self.found is not None and not self._ways

    @property
    def idle(self) -> bool:
        """Whether nothing of the text so far may be part of a match."""
        return self.found is None and all(way.start == self._at for way in self._ways)

    @property
    def undecided(self) -> int:
        """Where the earliest match begins that there may be."""
        starts = [way.start for way in self._ways[:1]] + ([] if self.found is None else [self.found.start])
        return min(starts, default=self._at)

    def skip(self, at: int) -> None:
        """Go on at a later place, where it is idle."""
        self._at, self._ways = at, []
        self._begin(at)

    def take(self, char: str) -> None:
        """The next character."""
        ways, self._ways, seen = self._ways, [], set[int]()
        self._at += 1
        for way in ways:
            step = self.pattern.code[way.step]
            taken = step.test is not None and step.test(char)
            if taken and self._follow(way.step + 1, way.start, way.places, seen):
                break  # what follows was preferred less
        if self.found is None:
            self._begin(self._at, seen)

    def end(self) -> None:
        """The text ends here."""
        ways, self._ways = self._ways, []
        seen = set[int]()
        for way in ways:
            if self.pattern.code[way.step].kind == "end" and self._follow(
                way.step + 1, way.start, way.places, seen, ended=True
            ):
                break
        self._ways = []

    def _begin(self, at: int, seen: set[int] | None = None) -> None:
        self._follow(0, at, (), set() if seen is None else seen)

    def _follow(self, step: int, start: int, places: Groups, seen: set[int], *, ended: bool = False) -> bool:
        """Go to the steps that want text; returns whether the end of the pattern was reached."""
        stack = [(step, places)]
        while stack:
            step, places = stack.pop()
            if step in seen:
                continue
            seen.add(step)
            code = self.pattern.code[step]
            if code.kind == "match":
                self.found = self._match(start, places)
                return True
            if code.kind == "split":
                stack += [(each, places) for each in reversed(code.to)]
            elif code.kind == "save":
                stack.append((step + 1, (*places, (code.slot, self._at))))
            elif (code.kind == "begin" and self._at == 0) or (code.kind == "end" and ended):
                stack.append((step + 1, places))
            elif code.kind != "begin" and not ended:
                self._ways.append(_Way(step, start, places))
        return False

    def _match(self, start: int, places: Groups) -> Found:
        passed = dict(places)
        groups = {
            name: (passed[2 * number], passed[2 * number + 1])
            for name, number in self.pattern.names.items()
            if 2 * number + 1 in passed
        }
        return Found(start, passed.get(1, self._at), groups)
