"""The text of an answer, as its tokens come or in one go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from makeready.engine.text.detokenize import StreamDetokenizer
from makeready.engine.text.stop import StopMatcher
from makeready.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from makeready.engine.sampling import SamplingParams


def has_stops(params: SamplingParams) -> bool:
    """Whether anything in the text ends it."""
    return bool(params.stop or params.stop_regex)


def stops_of(params: SamplingParams) -> StopMatcher:
    """What looks for the stops of a request.

    Raises:
        TextError: a pattern is broken, too large or matches the empty text.
    """
    return StopMatcher(params.stop, params.stop_regex, include=params.no_stop_trim)


def whole_text(
    tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, *, ended: bool
) -> str:
    """The text of an answer without stops; ``ended`` if its last token is one that ends it."""
    # Such a token is no part of the text, unless that was asked for.
    shown = output[:-1] if ended and not params.no_stop_trim else output
    return StreamDetokenizer(tokenizer, params.skip_special_tokens, prompt).whole(shown)


class AnswerText:
    """An answer's text as its tokens come, for stops and for who reads along.

    Stop strings and patterns see special tokens too, as in SGLang; where these are to be skipped, they are taken
    out of what comes back from the matcher.

    Args:
        prompt: token ids that the answer goes on from.
        told: every piece of text that became final, as it does.

    Attributes:
        pieces: all of them.
        matched: the stop string or pattern that ended the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
        told: Callable[[str], None] | None = None,
    ) -> None:
        skip = params.skip_special_tokens
        self.pieces: list[str] = []
        self.matched: str | None = None
        self._told = told
        self._trim = not params.no_stop_trim
        self._detokenizer = StreamDetokenizer(tokenizer, skip, prompt)
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_texts if skip and has_stops(params) else frozenset()
        self._stop = stops_of(params)
        # Lengths of what the matcher was given and has not given back, and whether it is to be shown.
        self._stretches: deque[tuple[int, bool]] = deque()

    def take(self, token: int, *, ends: bool) -> None:
        """The next token; if it ``ends`` the text, it is no part of it unless that was asked for."""
        if ends:
            kept = () if self._trim else (token,)
            # Stops may reach back before it.
            self._feed(self._detokenizer.push(kept) + self._detokenizer.flush())
            return
        if self._hidden and (text := self._tokenizer.id_to_token(token)) in self._hidden:
            self._feed(self._detokenizer.settle())
            if self.matched is None:
                self._feed(text or "", shown=False)
            return
        self._feed(self._detokenizer.push((token,)))

    def end(self) -> None:
        """No token comes any more: let go of what was held back."""
        if self.matched is None and not self._feed(self._detokenizer.flush()):
            self._emit(*self._stop.flush())

    def _feed(self, text: str, shown: bool = True) -> bool:
        """Show a piece of text to the matcher; returns whether the text ends there."""
        if text:
            self._stretches.append((len(text), shown))
        emit, stopped, matched = self._stop.push(text)
        self._emit(emit, stopped, matched)
        return stopped

    def _emit(self, text: str, stopped: bool, matched: str | None) -> None:
        text = self._shown(text)
        if text:
            self.pieces.append(text)
            if self._told is not None:
                self._told(text)
        if stopped:
            self.matched = matched

    def _shown(self, text: str) -> str:
        """What the matcher gives back, without special tokens that are to be skipped."""
        pieces, at = [], 0
        while at < len(text):
            length, shown = self._stretches.popleft()
            taken = min(length, len(text) - at)
            if taken < length:
                self._stretches.appendleft((length - taken, shown))
            if shown:
                pieces.append(text[at : at + taken])
            at += taken
        return "".join(pieces)
