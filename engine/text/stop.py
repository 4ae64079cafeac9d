"""Find stop strings and stop patterns in text that arrives in pieces."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from makeready.engine.text.parts import TextError
from makeready.engine.text.patterns import compile_pattern

if TYPE_CHECKING:
    import re2

# Longest match of a stop pattern, in characters. That much text is held back while patterns are in
# use, since a match may begin in it.
REGEX_WINDOW = 256
# Processor seconds that the patterns of a text may take: at once, and more for each character. Ordinary ones take
# 2 us a character. The largest that are compiled take 2 ms, and others would wait for that at every token.
REGEX_SECONDS, REGEX_SECONDS_A_CHARACTER = 0.25, 1e-4


class _Stop(NamedTuple):
    """A match in `_text`, and the stop string or pattern it is of."""

    start: int
    end: int
    matched: str


class StopMatcher:
    """Holds back text that may belong to a stop, and says when generation ends.

    What is found does not depend on how the text is cut into pieces:

    - Strings: the match that begins first wins; of those that begin together, the longest. A string that
      is complete is therefore reported only once no longer or earlier one can still become complete.
    - Patterns: a pattern matches as soon as the text so far holds a match of at most `REGEX_WINDOW`
      characters (so `$` and `\\b` hold at the end of the text so far). Patterns see no text
      beyond the end of a matched string.
    - Both: the match that begins first wins, then the longest, then the string.

    Args:
        strings: stop strings.
        regexes: stop patterns (SGLang's `stop_regex`); see `makeready.engine.text.patterns`.
        include: keep the match in the text (SGLang's `no_stop_trim`); else text ends before it.

    Raises:
        TextError: an empty stop string, or a pattern that is broken, too large or matches the empty text.
    """

    def __init__(self, strings: Sequence[str], regexes: Sequence[str] = (), include: bool = False) -> None:
        if isinstance(strings, str) or isinstance(regexes, str):
            raise TextError("stop strings and patterns must come as lists; write stop=['...']")
        if not all(isinstance(text, str) and text for text in strings):
            raise TextError(f"stop strings must be non-empty texts, not {list(strings)!r}; remove the others")
        self._strings = tuple(dict.fromkeys(strings))
        if not all(isinstance(text, str) for text in regexes):
            raise TextError(f"stop patterns must be texts, not {list(regexes)!r}; remove the others")
        self._patterns = tuple(compile_pattern(regex, len(regexes)) for regex in regexes)
        self._sources = tuple(regexes)
        self._include = include
        self._longest = max(map(len, self._strings), default=0)
        self._first_characters = frozenset(string[0] for string in self._strings)
        self._text = ""  # from here on: _context characters that were emitted, then those held back
        self._context = 0
        self._searched = 0  # end of the text that patterns have seen
        self._seconds = REGEX_SECONDS  # that they may still take
        self._regex_match: _Stop | None = None
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, bool, str | None]:
        """Take the next piece of text.

        Returns:
            (emit, stopped, matched): text that may be shown, whether the text ends here, and the stop
            string or pattern that ended it. After a stop further pieces are ignored.

        Raises:
            TextError: a pattern takes too long.
        """
        return self._take(text, final=False)

    def flush(self) -> tuple[str, bool, str | None]:
        """The text ended by itself: what was held back, and a stop that waited for a longer one.

        Raises:
            TextError: a pattern takes too long.
        """
        return self._take("", final=True)

    def _take(self, text: str, final: bool) -> tuple[str, bool, str | None]:
        if self._matched is not None:
            return "", True, self._matched
        self._text += text
        end = len(self._text)
        unfinished = end if final else self._first_unfinished()
        complete = self._first_string()
        # A string that wins later ends here or beyond the text, so no pattern sees too much.
        self._search_patterns(end if complete is None else complete.end)
        regex = self._regex_match
        stop = complete
        if regex is not None and (stop is None or (regex.start, -regex.end) < (stop.start, -stop.end)):
            stop = regex
        # What is unfinished and begins no later may yet become an earlier or longer match.
        if stop is not None and (unfinished == end or stop.start < unfinished):
            self._matched = stop.matched
            cut = stop.end if self._include else stop.start
            return self._text[self._context : cut], True, stop.matched
        shown = unfinished
        if regex is not None:
            shown = min(shown, regex.start)
        elif self._patterns and not self._include and not final:
            shown = min(shown, self._searched - REGEX_WINDOW + 1)
        return self._emit_until(max(shown, self._context)), False, None

    def _first_string(self) -> _Stop | None:
        """The complete stop string that begins first, the longest of those that begin there."""
        best: _Stop | None = None
        for string in self._strings:
            start = self._text.find(string, self._context)
            if start < 0:
                continue
            stop = _Stop(start, start + len(string), string)
            if best is None or (start, -stop.end) < (best.start, -best.end):
                best = stop
        return best

    def _first_unfinished(self) -> int:
        """Where the earliest stop string begins that the next piece could complete; the end if none."""
        end = len(self._text)
        for start in range(max(self._context, end - self._longest + 1), end):
            if self._text[start] not in self._first_characters:
                continue
            tail = self._text[start:]
            if any(len(string) > len(tail) and string.startswith(tail) for string in self._strings):
                return start
        return end

    def _search_patterns(self, end: int) -> None:
        """Let every pattern see the text up to `end`, growing by one character at a time."""
        if self._regex_match is not None or not self._patterns:
            return
        self._seconds += REGEX_SECONDS_A_CHARACTER * max(0, end - self._searched)
        for end_seen in range(self._searched + 1, end + 1):
            # One character before the window tells `^` and `\\b` that they are not at the beginning.
            start = max(0, end_seen - REGEX_WINDOW - 1)
            text = self._text[start:end_seen].encode()
            skipped = len(self._text[start].encode()) if end_seen - start > REGEX_WINDOW else 0
            found = [
                _Stop(start + _characters(text, stop[0]), start + _characters(text, stop[1]), source)
                for pattern, source in zip(self._patterns, self._sources, strict=True)
                if (stop := self._search(pattern, text, skipped, source))
            ]
            if found:
                self._regex_match = min(found, key=lambda stop: (stop.start, -stop.end))
                return
        self._searched = max(self._searched, end)

    def _search(self, pattern: re2._Regexp, text: bytes, begin: int, source: str) -> tuple[int, int] | None:
        """Begin and end of a match in ``text`` from ``begin`` on, in bytes."""
        if self._seconds <= 0:
            raise TextError(
                f"stop pattern {source!r} takes too long to look for; make it shorter, or let it repeat less"
            )
        began = time.thread_time()
        match = pattern.search(text, begin)
        self._seconds -= time.thread_time() - began
        return match.span() if match else None

    def _emit_until(self, end: int) -> str:
        """Give out text up to `end`; with patterns, two windows of it stay for what they look back at."""
        emit = self._text[self._context : end]
        # The second window also keeps `^` and `\A` from taking the cut for the start of the text.
        dropped = max(0, end - 2 * REGEX_WINDOW) if self._patterns else end
        self._text = self._text[dropped:]
        self._context = end - dropped
        self._searched = max(0, self._searched - dropped)
        if self._regex_match is not None:
            stop = self._regex_match
            self._regex_match = _Stop(stop.start - dropped, stop.end - dropped, stop.matched)
        return emit


def _characters(text: bytes, end: int) -> int:
    """Characters before a byte."""
    return len(text[:end].decode())
