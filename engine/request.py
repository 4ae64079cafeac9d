"""A request on its way through the engine, and what it comes back as."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.sampling import SamplingParams
from makeready.engine.text.detokenize import StreamDetokenizer
from makeready.engine.text.stop import StopMatcher

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token's log-probability, and those of the most probable ones in its place.

    Both are of the model's own distribution, before bias, penalties and temperature.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What became of one sample of one prompt.

    Attributes:
        text: generated text; empty where there is no tokenizer.
        token_ids: generated tokens, the one that ended them included.
        finish_reason: ``stop`` (end token, stop string or id), ``length``, ``abort`` or ``error``.
        logprobs: one entry a generated token, where asked for.
        prompt_tokens, completion_tokens: how many.
        error: why it was refused, where it was.
        meta_info: the same figures under SGLang's names, the seed that was used, and times in seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
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


@dataclass
class Request:
    """One sample of one prompt, from arrival to finish.

    Attributes:
        prompt: its token ids.
        seed: what its random choices are drawn from.
        end_ids: token ids that end it.
        detokenizer: None where there is no tokenizer.
        on_text: told every piece of text that became final.
        output: token ids generated so far.
        computed: how many of prompt + output have their keys and values in the cache.
        slot: its place in the device's slot table while it runs.
        pages: the KV pages that it holds, in order.
    """

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    end_ids: frozenset[int]
    detokenizer: StreamDetokenizer | None = None
    on_text: Callable[[str], None] | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    computed: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    matched: int | str | None = None
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        params = self.sampling
        self._stop = StopMatcher(params.stop, params.stop_regex, include=params.no_stop_trim)  # type: ignore[arg-type]
        self._text: list[str] = []

    @property
    def length(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def pending(self) -> int:
        """Known tokens that have not been run yet: the rest of the prompt, or the last sampled one."""
        return self.length - self.computed

    @property
    def most_tokens(self) -> int:
        """Tokens that it can come to at most."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def done(self) -> bool:
        """Whether it has finished for whatever reason."""
        return self.finish_reason is not None

    def append(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take in a sampled token; sets ``finish_reason`` if it was the last."""
        if not self.output:
            self.first_token = time.perf_counter()
        self.output.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        ended = token in self.end_ids and len(self.output) > self.sampling.min_new_tokens
        if self.detokenizer is not None:
            # The token that ends a text is no part of it; stop strings may reach back before it.
            piece = self.detokenizer.flush() if ended else self.detokenizer.push((token,))
            self._emit(*self._stop.push(piece))
        if self.done:
            return
        if ended:
            self.finish(STOP, token)
        elif len(self.output) >= self.sampling.max_new_tokens:
            self.finish(LENGTH)

    def finish(self, reason: str, matched: int | str | None = None) -> None:
        """End the request and let go of held-back text."""
        self.finish_reason, self.matched = reason, matched
        self.finished = time.perf_counter()
        if self.detokenizer is not None and not isinstance(matched, str):
            emit, stopped, found = self._stop.push(self.detokenizer.flush())
            self._emit(emit, stopped, found)
            if not stopped:
                self._emit(*self._stop.flush())

    def result(self) -> Output:
        """The finished request as the user sees it."""
        reason: dict[str, Any] = {"type": self.finish_reason}
        if self.finish_reason == STOP:
            reason["matched"] = self.matched
        elif self.finish_reason == LENGTH:
            reason["length"] = len(self.output)
        meta = {
            "finish_reason": reason,
            "prompt_tokens": len(self.prompt),
            "completion_tokens": len(self.output),
            "cached_tokens": 0,
            "seed": self.seed,
            "queue_time": self.admitted - self.arrived,
            "time_to_first_token": self.first_token - self.arrived,
            "e2e_latency": self.finished - self.arrived,
        }
        return Output(
            text="".join(self._text),
            token_ids=tuple(self.output),
            finish_reason=self.finish_reason or ABORT,
            prompt_tokens=len(self.prompt),
            logprobs=tuple(self.logprobs) if self.sampling.return_logprob else None,
            meta_info=meta,
        )

    def _emit(self, text: str, stopped: bool, matched: str | None) -> None:
        if text:
            self._text.append(text)
            if self.on_text is not None:
                self.on_text(text)
        if stopped:
            self.finish_reason, self.matched = STOP, matched
            self.finished = time.perf_counter()
