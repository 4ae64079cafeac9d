"""Grammars that an output has to follow, by llguidance: JSON schemas, regular expressions, GBNF, Lark, choices.

What llguidance cannot enforce it refuses by name, so an output that came to its end is valid.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from makeready.engine.errors import RequestError
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.formats.turn import BLANKS

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from makeready.engine.text.tokenizer import Tokenizer

LONGEST = 2**20  # characters of a grammar
_KEPT = 64  # grammars that were compiled last


class Grammar:
    """The state of an output in its grammar: a :class:`~makeready.engine.constraint.Constraint`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.error: str | None = None

    def copy(self) -> Grammar:
        """The same state, which goes its own way from here."""
        return Grammar(self._matcher.deep_copy())

    def take(self, token: int) -> bool:
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def allow(self, words: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            self.error = f"the grammar cannot be followed any further: {reason}; simplify it"


class Grammars:
    """Compiles grammars for a tokenizer, and keeps those of late; for several threads.

    Args:
        vocabulary: tokens that have a logit.
        end_ids: tokens that a complete output may end with.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, list(end_ids)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._read: LLTokenizer | None = None
        self._made: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def start(self, sampling: SamplingParams) -> Grammar | None:
        """The grammar that is asked for, at its beginning; None where none is.

        Takes 1 to 10 ms, for large grammars up to 3 s; the first takes a second more.

        Raises:
            RequestError: it is broken, too large, or has what cannot be enforced.
        """
        asked = sampling.grammar
        return None if asked is None else self.begin(*asked)

    def begin(self, kind: str, value: Any) -> Grammar:
        """The same of a field of ``sampling.GRAMMARS`` and its value."""
        key = (kind, json.dumps(value))
        with self._lock:
            found = self._made.get(key)
            if found is not None:
                self._made.move_to_end(key)
                return found.copy()
        made = self._compile(kind, value, len(key[1]))
        with self._lock:
            self._made[key] = made
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return made.copy()

    def _compile(self, kind: str, value: Any, size: int) -> Grammar:
        from llguidance import LLMatcher

        if size > LONGEST:
            raise RequestError(f"{kind} has {size:,} characters, at most {LONGEST:,} are read; shorten it")
        try:
            text = _SPELLED[kind](value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{kind} cannot be read: {_reason(str(error))}; correct it") from None
        matcher = LLMatcher(self._vocabulary_of(), text, log_level=0)
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            raise RequestError(f"{kind} cannot be enforced: {reason}; correct or simplify it")
        return Grammar(matcher)

    def _vocabulary_of(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._reading:
            if self._read is None:
                self._read = LLTokenizer(
                    self._tokenizer.backend.to_str(), n_vocab=self._vocabulary, eos_token=self._end_ids
                )
            return self._read


def _json(schema: Any) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": BLANKS})


def _lark(grammar: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(grammar)


def _regex(pattern: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


def _gbnf(grammar: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return _lark(gbnf_to_lark(grammar))
    except Exception as error:  # it raises no narrower one
        raise ValueError(str(error)) from None


def _choice(choices: list[str]) -> str:
    return _lark(f"start: {' | '.join(json.dumps(choice) for choice in choices)}")


_SPELLED: Mapping[str, Callable[[Any], str]] = {
    "json_schema": _json,
    "regex": _regex,
    "ebnf": _gbnf,
    "lark": _lark,
    "choice": _choice,
}


def _reason(text: str) -> str:
    """What an error of several lines says, without the drawing of the place."""
    said = re.search(r"^error: (.+)", text, re.MULTILINE)
    return re.sub(r"\s+", " ", said[1] if said else text.strip().partition("\n")[0])[:300]
