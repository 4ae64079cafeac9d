"""The text of an answer, as its tokens come or in one go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from makeready.engine.message import Event, Gathered, Message
from makeready.engine.text.detokenize import StreamDetokenizer
from makeready.engine.text.formats.scan import Reading, Scanner
from makeready.engine.text.formats.source import Token
from makeready.engine.text.stop import StopMatcher
from makeready.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from makeready.engine.sampling import SamplingParams

ONE_CALL = "tool_calls"  # what ended a text that may have one call, and has it


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
    out of what comes back from the matcher. A scanner of reasoning and calls sees them as well.

    Args:
        prompt: token ids that the answer goes on from.
        told: every piece of text that became final, as it does.
        reading: how its message is written, where that is to be read.
        told_event: every piece of the message that became final.
        call_id: see :class:`Scanner`.

    Attributes:
        pieces: all of them.
        matched: the stop string or pattern that ended the text, or :data:`ONE_CALL`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: SamplingParams,
        told: Callable[[str], None] | None = None,
        *,
        reading: Reading | None = None,
        told_event: Callable[[Event], None] | None = None,
        call_id: Callable[[int, str], str] = lambda number, name: f"call_{number}",
    ) -> None:
        self._skip = skip = params.skip_special_tokens
        self.pieces: list[str] = []
        self.matched: str | None = None
        self._told = told
        self._trim = not params.no_stop_trim
        self._detokenizer = StreamDetokenizer(tokenizer, skip, prompt)
        self._tokenizer = tokenizer
        scans = reading is not None and self._detokenizer.streams
        self._apart = tokenizer.special_texts if scans or (skip and has_stops(params)) else frozenset()
        self._stop = stops_of(params)
        # Lengths of what the matcher was given and has not given back, and whether it is a special token.
        self._stretches: deque[tuple[int, bool]] = deque()
        self._token = ""  # of a special token that the matcher gives back in parts
        self._gathered, self._told_event = Gathered(), told_event
        self._scanner = None if reading is None else Scanner(reading, self._apart, skip, call_id)

    def take(self, token: int, *, ends: bool) -> None:
        """The next token; if it ``ends`` the text, it is no part of it unless that was asked for."""
        if ends:
            kept = () if self._trim else (token,)
            # Stops may reach back before it.
            self._feed(self._detokenizer.push(kept) + self._detokenizer.flush())
            return
        text = self._tokenizer.id_to_token(token) if self._apart else None
        if text is None or text not in self._apart:
            self._feed(self._detokenizer.push((token,)))
            return
        before = self._detokenizer.settle() if self._skip else self._detokenizer.push((token,))
        if not self._skip:
            if not before.endswith(text):  # the decoder writes it in a way of its own
                self._feed(before)
                return
            before = before.removesuffix(text)
        self._feed(before)
        if self.matched is None:
            self._feed(text, special=True)

    def end(self) -> None:
        """No token comes any more: let go of what was held back."""
        if self.matched is None and not self._feed(self._detokenizer.flush()):
            self._emit(*self._stop.flush())
        if self._scanner is not None:
            self._tell_events(self._scanner.end())

    @property
    def message(self) -> Message | None:
        """What the text says so far; None where that is not read."""
        return None if self._scanner is None else self._gathered.message()

    def _feed(self, text: str, special: bool = False) -> bool:
        """Show a piece of text to the matcher; returns whether the text ends there."""
        if text:
            self._stretches.append((len(text), special))
        emit, stopped, matched = self._stop.push(text)
        self._emit(emit, stopped, matched)
        return stopped

    def _emit(self, text: str, stopped: bool, matched: str | None) -> None:
        shown: list[str] = []
        for part, special, whole in self._parts(text):
            if not (special and self._skip):
                shown.append(part)
            if special:
                part, self._token = self._token + part, "" if whole else self._token + part
            if self._scanner is not None and not self._scanner.full and (whole or not special):
                self._tell_events(self._scanner.feed(Token(part) if special else part))
        if text := "".join(shown):
            self.pieces.append(text)
            if self._told is not None:
                self._told(text)
        if stopped:
            self.matched = matched
        elif self._scanner is not None and self._scanner.full:
            self.matched = ONE_CALL

    def _parts(self, text: str) -> Iterator[tuple[str, bool, bool]]:
        """What the matcher gives back, by whether it is of a special token, and is the end of one."""
        at = 0
        while at < len(text):
            length, special = self._stretches.popleft()
            taken = min(length, len(text) - at)
            if taken < length:
                self._stretches.appendleft((length - taken, special))
            yield text[at : at + taken], special, taken == length
            at += taken

    def _tell_events(self, events: Sequence[Event]) -> None:
        for event in events:
            self._gathered.take(event)
            if self._told_event is not None:
                self._told_event(event)
