"""Grammars that an output has to follow, by llguidance: JSON schemas, regular expressions, GBNF, Lark, choices.

What llguidance cannot enforce it refuses by name, so an output that came to its end is valid.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from makeready.engine.errors import RequestError
from makeready.engine.text.lark import Markers, check_optional, with_blanks
from makeready.engine.text.message_grammar import MessageGrammar
from makeready.engine.text.structural_tag import structural_tag

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

    from makeready.engine.text.tokenizer import Tokenizer

ANY = ("tools", None)  # an answer that may be any text where no tool is called
MANY = 128  # rows from which on threads compute masks
LONGEST = 2**20  # characters of a grammar
_KEPT = 64  # grammars that were compiled last


class Grammar:
    """The state of an output in its grammar: a :class:`~makeready.engine.constraint.Constraint`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._forced: deque[int] = deque()
        self.error: str | None = None

    def copy(self) -> Grammar:
        """The same state, which goes its own way from here."""
        made = Grammar(self._matcher.deep_copy())
        made._forced.extend(self._forced)
        return made

    def take(self, token: int) -> bool:
        if self._forced:
            expected = self._forced.popleft()
            assert token == expected, "another token came than the one that was sure to"
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def forced(self) -> Sequence[int]:
        """The text that is sure to come, as the tokenizer cuts it whatever follows; see :class:`.Constraint`."""
        if not self._forced and self.error is None:
            self._forced.extend(self._matcher.compute_ff_tokens())
            self._check()
        return self._forced

    def allow(self, words: np.ndarray) -> None:
        if self._forced:
            words[:] = 0
            words.view(np.uint32)[self._forced[0] // 32] = 1 << self._forced[0] % 32
            return
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()

    @classmethod
    def allow_all(cls, constraints: Sequence[Grammar], words: np.ndarray, rows: Sequence[int]) -> None:
        """By threads where there are many: a mask takes 10 to 100 us, to wake threads as long as some of them."""
        computed: list[tuple[LLMatcher, int]] = []
        for grammar, row in zip(constraints, rows, strict=True):
            if grammar._forced or len(constraints) < MANY:
                grammar.allow(words[row])
            else:
                computed.append((grammar._matcher, row))
        if computed:
            _threads().unsafe_compute_mask_ptr(computed, words.ctypes.data, words[0].nbytes, len(words))
            for grammar in constraints:
                grammar._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            self.error = f"the grammar cannot be followed any further: {reason}; simplify it"


@cache
def _threads() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor()


class Grammars:
    """Compiles grammars for a tokenizer, and keeps those of late; for several threads.

    Args:
        vocabulary: tokens that have a logit.
        end_ids: tokens that a complete output may end with.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, list(end_ids)
        self._markers = Markers(tokenizer, end_ids)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._read: LLTokenizer | None = None
        self._made: OrderedDict[tuple[str, str, str], Grammar] = OrderedDict()

    def start(self, asked: tuple[str, Any] | None, message: MessageGrammar | None = None) -> Grammar:
        """A grammar at its beginning.

        Takes 1 to 10 ms, for large grammars up to some seconds; the first takes a second more.

        Args:
            asked: a field of :data:`~makeready.engine.sampling.GRAMMARS` and what it holds; None for any text.
            message: that the output is, where it has more than an answer.

        Raises:
            RequestError: it is broken, too large, or has what cannot be enforced.
        """
        frame = message.lark(self._markers, asked is not None) if message is not None else ""
        return self.made(*(asked or ANY), frame)

    def made(self, kind: str, value: Any, frame: str) -> Grammar:
        """As :meth:`start`, of a message whose grammar, in which the answer is ``@content``, is known."""
        _check_size(kind, frame)
        key = (kind, json.dumps(value), frame)
        with self._lock:
            found = self._made.get(key)
            if found is not None:
                self._made.move_to_end(key)
                return found.copy()
        made = self._compile(kind, value, frame)
        with self._lock:
            self._made[key] = made
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return made.copy()

    def _compile(self, kind: str, value: Any, frame: str) -> Grammar:
        from llguidance import LLMatcher

        spelled = frame if value is None else _framed(_spelled(kind, value, self._markers), frame)
        matcher = LLMatcher(self._vocabulary_of(), spelled, log_level=0)
        _raise(kind, matcher.get_error())
        return Grammar(matcher)

    def _vocabulary_of(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._reading:
            if self._read is None:
                self._read = LLTokenizer(
                    self._tokenizer.backend.to_str(), n_vocab=self._vocabulary, eos_token=self._end_ids
                )
            return self._read


def check_grammar(kind: str, value: Any) -> None:
    """Raise what :meth:`Grammars.start` would, without a tokenizer."""
    from llguidance import LLMatcher

    wrong, said = LLMatcher.validate_grammar_with_warnings(_spelled(kind, value, Markers()))
    _raise(kind, said[0] if wrong else "")


def _framed(content: str, frame: str) -> str:
    """A grammar as ``@content`` of another."""
    if not frame:
        return content
    own = json.loads(content)["grammars"] if content.startswith("{") else [{"lark_grammar": content}]
    return json.dumps(
        {"grammars": [{"name": "message", "lark_grammar": frame}, own[0] | {"name": "content"}, *own[1:]]}
    )


def _check_size(kind: str, text: str) -> None:
    if len(text) > LONGEST:
        raise RequestError(f"{kind} has {len(text):,} characters, at most {LONGEST:,} are read; shorten it")


def _spelled(kind: str, value: Any, markers: Markers) -> str:
    """A grammar as llguidance takes it."""
    _check_size(kind, json.dumps(value))
    try:
        return structural_tag(value, markers) if kind == "structural_tag" else _SPELLED[kind](value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{kind} cannot be read: {_reason(str(error))}; correct it") from None


def _raise(kind: str, error: str) -> None:
    if error:
        raise RequestError(f"{kind} cannot be enforced: {_reason(error)}; correct or simplify it")


def _json(schema: Any) -> str:
    from llguidance import LLMatcher

    check_optional(schema)
    return LLMatcher.grammar_from_json_schema(with_blanks(schema))


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
