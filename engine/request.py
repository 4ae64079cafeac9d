"""A request on its way through the engine, and what it comes back as."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from makeready.engine.errors import reason_of
from makeready.engine.kv.radix import Prefix
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.detokenize import StreamDetokenizer
from makeready.engine.text.stop import StopMatcher
from makeready.engine.text.tokenizer import Tokenizer

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"
TEXT_FAILED = "the request's text cannot be made"


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and those of the most probable ones in its place.

    Both are of the model's own distribution, before bias, penalties and temperature. The first token of a
    prompt, which nothing goes before, has None.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What became of one sample of one prompt.

    Attributes:
        text: generated text; empty where there is no tokenizer.
        token_ids: generated tokens, the one that ended them included.
        finish_reason: ``stop`` (end token, stop string or id), ``length``, ``abort`` or ``error``.
        logprobs: one entry a generated token, where asked for.
        input_logprobs: one entry a token of the prompt from ``logprob_start_len`` on, where asked for.
        prompt_tokens, completion_tokens: how many.
        error: why it was refused, or could not go on, where it was so.
        meta_info: the same figures under SGLang's names, the seed that was used, and times in seconds; there is
            no ``time_to_first_token`` where no token came.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    input_logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    meta_info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated."""
        return len(self.token_ids)

    @classmethod
    def refused(cls, reason: str) -> Output:
        """A request that never ran."""
        meta = {
            "finish_reason": {"type": ERROR, "message": reason},
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }
        return cls("", (), ERROR, 0, error=reason, meta_info=meta)


@dataclass(eq=False, slots=True)
class Request:
    """One sample of one prompt, from arrival to finish.

    Attributes:
        prompt: its token ids.
        seed: what its random choices are drawn from.
        end_ids: token ids that end it.
        tokenizer: None where there is none; its output then has no text.
        on_text: told every piece of text that became final, as it does.
        salt: it shares cached prefixes with requests of the same salt only (SGLang's ``extra_key``).
        priority: higher goes first, under the policy of that name.
        id: a name that no other request has.
        output: token ids generated so far.
        scored: the first token of its prompt whose log-probability is yet to be computed; its length if none.
        slot: its place in the device's slot table while it runs, else -1.
        prefix: what it holds of the prefix cache while it runs.
        cached_tokens: of its prompt, how many did not have to be run.
        retractions: how often it was sent back to wait.
        ticket: its place in the order of arrival.
        passed_over: how often another was admitted while this one had waited longest.
        urgent: it has waited for so long that it goes before all others.
        borrowed: it used pages that another request computed.
        isolated: it shares pages with no other.
    """

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    end_ids: frozenset[int]
    tokenizer: Tokenizer | None = None
    on_text: Callable[[str], None] | None = None
    salt: str = ""
    priority: int = 0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    input_logprobs: list[TokenLogprob] = field(default_factory=list)
    scored: int = field(default=0, init=False)
    slot: int = -1
    prefix: Prefix | None = None
    cached_tokens: int = 0
    retractions: int = 0
    ticket: int = -1
    passed_over: int = 0
    urgent: bool = False
    borrowed: bool = False
    isolated: bool = False
    finish_reason: str | None = None
    matched: int | str | None = None
    error: str | None = None
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    _watch: _Watch | None = field(default=None, init=False, repr=False)
    _ids: np.ndarray | None = field(default=None, init=False, repr=False)
    _page_keys: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self._stops:  # what cannot be understood is refused here, not while it runs
            self._matcher()
        self._begin_scoring()

    def _begin_scoring(self) -> None:
        first, length = self.sampling.logprob_start_len, len(self.prompt)
        self.scored = max(first, 1) if 0 <= first < length else length
        self.input_logprobs = [TokenLogprob(self.prompt[0], None)] if first == 0 else []

    def isolate(self) -> None:
        """Compute what is known again, with pages of its own alone."""
        self.isolated, self.borrowed, self.cached_tokens = True, False, 0
        self.salt = f"{self.salt}\0{self.id}"
        self._page_keys.clear()
        if not self.output:
            self._begin_scoring()

    @property
    def length(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """Tokens that it can come to at most; one is sampled in any case."""
        return len(self.prompt) + max(1, self.sampling.max_new_tokens)

    @property
    def left(self) -> int:
        """Tokens that may still be sampled for it."""
        return max(1, self.sampling.max_new_tokens) - len(self.output)

    @property
    def done(self) -> bool:
        """Whether it has finished for whatever reason."""
        return self.finish_reason is not None

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of its prompt are yet to be computed."""
        return self.scored < len(self.prompt)

    @property
    def reusable(self) -> int:
        """Tokens, from the first on, that need not be run if they are cached.

        The last is run whatever is cached, for its logits; so is whatever comes before a token whose
        log-probability is asked for.
        """
        return (self.scored if self.scoring else self.length) - 1

    def ids(self) -> np.ndarray:
        """Token ids of prompt and output, int32; kept until there are more."""
        if self._ids is None:
            self._ids = np.array(self.prompt, np.int32)
        more = len(self._ids) - len(self.prompt)
        if more < len(self.output):
            self._ids = np.append(self._ids, np.array(self.output[more:], np.int32))
        return self._ids

    def page_key(self, page: int, page_size: int) -> int:
        """A number that stands for all tokens up to the end of a page, and for the salt.

        Equal beginnings have equal keys; others differ, but for a chance of 2**-64. ``page_size`` is the
        same at every call.
        """
        keys = self._page_keys
        if page >= len(keys):
            ids = self.ids()
            key = keys[-1] if keys else hash(self.salt)
            for at in range(len(keys) * page_size, (page + 1) * page_size, page_size):
                key = hash((key, ids[at : at + page_size].tobytes()))
                keys.append(key)
        return keys[page]

    @property
    def _stops(self) -> bool:
        return bool(self.sampling.stop or self.sampling.stop_regex)

    def _matcher(self) -> StopMatcher:
        """Made when the request starts to generate: patterns take memory, and thousands may wait."""
        params = self.sampling
        return StopMatcher(params.stop, params.stop_regex, include=params.no_stop_trim)

    def append(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take in a sampled token; sets ``finish_reason`` if it was the last, or if none is wanted.

        Whatever its text or its stops raise ends this request alone.
        """
        output, sampling = self.output, self.sampling
        try:
            if not sampling.max_new_tokens:
                self.finish(LENGTH)
                return
            if not output:
                self.first_token = time.perf_counter()
                if self.tokenizer is not None and (self._stops or self.on_text is not None):
                    self._watch = _Watch(self, self.tokenizer)
            output.append(token)
            if logprob is not None:
                self.logprobs.append(logprob)
            ended = token in self.end_ids and len(output) > sampling.min_new_tokens
            if self._watch is not None:
                self._watch.take(token, ended)
                if self.finish_reason is not None:
                    return
            if ended:
                self.finish(STOP, token)
            elif len(output) >= sampling.max_new_tokens:
                self.finish(LENGTH)
        except BaseException as error:
            self.fail(reason_of(error, TEXT_FAILED))

    def finish(self, reason: str, matched: int | str | None = None) -> None:
        """End the request and let go of held-back text."""
        self.finish_reason, self.matched = reason, matched
        self.finished = time.perf_counter()
        if self._watch is not None and not isinstance(matched, str):
            try:
                self._watch.end()
            except BaseException as error:
                self.fail(reason_of(error, TEXT_FAILED))

    def fail(self, reason: str) -> None:
        """End the request for a reason that is its own."""
        self.finish_reason, self.error = ERROR, reason
        self.finished = time.perf_counter()

    def result(self) -> Output:
        """The finished request as the user sees it."""
        try:
            text = self._text()
        except BaseException as error:
            text = ""
            self.fail(reason_of(error, TEXT_FAILED))
        reason: dict[str, Any] = {"type": self.finish_reason}
        if self.finish_reason == STOP:
            reason["matched"] = self.matched
        elif self.finish_reason == LENGTH:
            reason["length"] = len(self.output)
        elif self.finish_reason == ERROR:
            reason["message"] = self.error
        meta = {
            "id": self.id,
            "finish_reason": reason,
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self.output),
            "cached_tokens": self.cached_tokens,
            "num_retractions": self.retractions,
            "seed": self.seed,
            "queue_time": (self.admitted or self.finished) - self.arrived,
            "time_to_first_token": self.first_token - self.arrived if self.output else None,
            "e2e_latency": self.finished - self.arrived,
        }
        return Output(
            text=text,
            token_ids=tuple(self.output),
            finish_reason=self.finish_reason or ABORT,
            prompt_tokens=len(self.prompt),
            logprobs=tuple(self.logprobs) if self.sampling.return_logprob else None,
            input_logprobs=tuple(self.input_logprobs) if self.sampling.logprob_start_len >= 0 else None,
            error=self.error,
            meta_info=meta,
        )

    def _text(self) -> str:
        """Text that nobody watched is made here, in one go."""
        if self._watch is not None:
            return "".join(self._watch.pieces)
        if self.tokenizer is None:
            return ""
        # The token that ends a text is no part of it, unless that was asked for.
        trimmed = isinstance(self.matched, int) and not self.sampling.no_stop_trim
        text = StreamDetokenizer(self.tokenizer, self.sampling.skip_special_tokens, self.prompt)
        return text.whole(self.output[:-1] if trimmed else self.output)


class _Watch:
    """A request's text as its tokens come, for stop strings and for who reads along.

    Stop strings and patterns see special tokens too, as in SGLang; where these are to be skipped, they are taken
    out of what comes back from the matcher.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._request = request
        skip = request.sampling.skip_special_tokens
        self._detokenizer = StreamDetokenizer(tokenizer, skip, request.prompt)
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_texts if skip and request._stops else frozenset()
        self._stop = request._matcher()
        # Lengths of what the matcher was given and has not given back, and whether it is to be shown.
        self._stretches: deque[tuple[int, bool]] = deque()
        self.pieces: list[str] = []

    def take(self, token: int, ended: bool) -> None:
        """The next token; ``ended`` if it ends the text, no part of which it is then unless asked for."""
        if ended:
            kept = (token,) if self._request.sampling.no_stop_trim else ()
            self._feed(
                self._detokenizer.push(kept) + self._detokenizer.flush()
            )  # stops may reach back before it
            return
        if self._hidden and (text := self._tokenizer.id_to_token(token)) in self._hidden:
            self._feed(self._detokenizer.settle())
            if not self._request.done:
                self._feed(text or "", shown=False)
            return
        self._feed(self._detokenizer.push((token,)))

    def end(self) -> None:
        """No token comes any more."""
        if not self._feed(self._detokenizer.flush()):
            self._emit(*self._stop.flush())

    def _feed(self, text: str, shown: bool = True) -> bool:
        """Show a piece of text to the matcher; returns whether the text ends there."""
        if text:
            self._stretches.append((len(text), shown))
        emit, stopped, matched = self._stop.push(text)
        self._emit(emit, stopped, matched)
        return stopped

    def _emit(self, text: str, stopped: bool, matched: str | None) -> None:
        request = self._request
        text = self._shown(text)
        if text:
            self.pieces.append(text)
            if request.on_text is not None:
                request.on_text(text)
        if stopped:
            request.finish_reason, request.matched = STOP, matched
            request.finished = time.perf_counter()

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
