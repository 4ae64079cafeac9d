"""What a sequence comes to for its caller: text, stops, log-probabilities, clocks, the result."""

from __future__ import annotations

import hashlib
import time
import uuid
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.errors import reason_of
from makeready.engine.message import Event
from makeready.engine.output import TOOL_CALLS, Output, TokenLogprob
from makeready.engine.sequence import ABORT, ERROR, LENGTH, STOP, TokenSequence
from makeready.engine.text.answer import AnswerText, has_stops, stops_of, whole_text
from makeready.engine.text.formats.scan import Reading
from makeready.engine.text.tokenizer import Tokenizer

TEXT_FAILED = "the request's text cannot be made"


AskedGrammar = tuple[str, Any, str]
"""Name and value of a grammar of answers, and the grammar of the message that they are in ("": nothing but them)."""


@dataclass(eq=False, slots=True)
class Reply:
    """The answer of one sequence, while it is made and when it is final.

    Attributes:
        sequence: what it is the answer of.
        tokenizer: None where there is none; the answer then has no text.
        reading: how its message is written, where reasoning and calls are to be told apart.
        grammar: what its output has to follow; None for nothing.
        on_text: told every piece of text that became final, as it does.
        on_event: told every piece of the message, as it becomes final.
        on_finish: told of this reply when it is final.
        id: a name that no other has.
        logprobs: one entry an output token, where asked for.
        input_logprobs: one entry a token of the prompt from ``logprob_start_len`` on, where asked for.
        error: why it could not go on.
        arrived, admitted, first_token, finished: seconds of ``time.perf_counter``; 0 for what was not yet.
    """

    sequence: TokenSequence
    tokenizer: Tokenizer | None = None
    reading: Reading | None = None
    grammar: AskedGrammar | None = None
    on_text: Callable[[str], None] | None = None
    on_event: Callable[[Event], None] | None = None
    on_finish: Callable[[Reply], None] | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    input_logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    error: str | None = field(default=None, init=False)
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float = field(default=0.0, init=False)
    first_token: float = field(default=0.0, init=False)
    finished: float = field(default=0.0, init=False)
    _text: AnswerText | None = field(default=None, init=False, repr=False)
    _read: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if has_stops(self.sequence.sampling):  # what cannot be understood is refused here, not while it runs
            stops_of(self.sequence.sampling)
        self.restart()

    @property
    def follows(self) -> bool:
        """Whether it has to know tokens as they come, and not only in the end."""
        return (self.tokenizer is not None and self._reads) or self.sequence.sampling.return_logprob

    @property
    def _reads(self) -> bool:
        """Whether its text has to be made as it comes: somebody reads along, or the text may end it."""
        one_call = self.reading is not None and not self.reading.parallel
        told = self.on_text is not None or self.on_event is not None
        return told or one_call or has_stops(self.sequence.sampling)

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: ``stop``, ``length``, ``abort`` or ``error``; None before."""
        return self.sequence.finish_reason

    @property
    def done(self) -> bool:
        """Whether it is final."""
        return self.finished > 0

    @property
    def matched(self) -> int | str | None:
        """What ended it where the reason is ``stop``: a token id, the stop string or pattern; None: its grammar."""
        text = None if self._text is None else self._text.matched
        if self.finish_reason != STOP or text is not None:
            return text
        return self.sequence.output[-1] if self.sequence.ends_with_token else None

    def restart(self) -> None:
        """Its sequence is computed again from the first token on; what is known of output stays."""
        sampling, prompt = self.sequence.sampling, self.sequence.prompt
        if not self.sequence.output:
            self.input_logprobs = [TokenLogprob(prompt[0], None)] if sampling.logprob_start_len == 0 else []

    def report(self, place: int, logprob: TokenLogprob) -> None:
        """Take in the log-probability of the token at a place of prompt or output."""
        (self.input_logprobs if place < len(self.sequence.prompt) else self.logprobs).append(logprob)

    def read(self) -> int:
        """Take in new tokens; where their text ends, their sequence ends with it.

        Whatever text or stops raise ends this answer alone.

        Returns:
            Tokens behind the end of the text, which the sequence has lost again.
        """
        sequence, output = self.sequence, self.sequence.output
        if self._read == len(output) or self.tokenizer is None:
            return 0
        count = len(output)
        try:
            text = self._text
            if text is None:  # made here: patterns take memory, and thousands may wait
                if not self._reads:
                    return 0
                self._text = text = self._made(self.tokenizer)
            while self._read < count and text.matched is None:
                token = output[self._read]
                self._read += 1
                text.take(token, ends=self._read == count and sequence.ends_with_token)
        except BaseException as error:
            self.fail(reason_of(error, TEXT_FAILED), self._read)
            return count - self._read
        if text.matched is None:
            return 0
        sequence.finish(STOP, self._read)
        return count - self._read

    def fail(self, reason: str, count: int | None = None) -> None:
        """End its sequence, after ``count`` output tokens if not None, for a reason that is its own."""
        self.sequence.finish(ERROR, count)
        self.error = reason

    def finish(self) -> None:
        """Its sequence has ended: let go of held-back text, and tell who waits for that."""
        if self.done:
            return
        self.finished = time.perf_counter()
        constraint = self.sequence.constraint
        if constraint is not None and self.finish_reason == ERROR and self.error is None:
            self.error = constraint.error
        del self.logprobs[len(self.sequence.output) :]
        if self._text is not None and self.error is None:
            try:
                self._text.end()
            except BaseException as error:
                self.fail(reason_of(error, TEXT_FAILED))
            if self._text.matched is not None and self.error is None:
                self.sequence.finish(STOP)
        if self.on_finish is not None:
            self.on_finish(self)

    def result(self) -> Output:
        """The final answer as its caller sees it."""
        sequence = self.sequence
        try:
            text = self._whole()
        except BaseException as error:
            text = ""
            self.fail(reason_of(error, TEXT_FAILED))
        output, sampling = sequence.output, sequence.sampling
        message = None if self._text is None else self._text.message
        reason: dict[str, Any] = {"type": sequence.finish_reason}
        if sequence.finish_reason == STOP:
            reason["matched"] = self.matched
        elif sequence.finish_reason == LENGTH:
            reason["length"] = len(output)
        elif sequence.finish_reason == ERROR:
            reason["message"] = self.error
        meta = {
            "id": self.id,
            "finish_reason": reason,
            "prompt_tokens": len(sequence.prompt),
            "completion_tokens": len(output),
            "cached_tokens": sequence.cached_tokens,
            "num_retractions": sequence.retractions,
            "seed": sequence.seed,
            "queue_time": (self.admitted or self.finished) - self.arrived,
            "time_to_first_token": self.first_token - self.arrived if output else None,
            "e2e_latency": self.finished - self.arrived,
        }
        if steps := sequence.verify_steps:
            meta |= {
                "spec_verify_ct": steps,
                "spec_draft_token_num": sequence.drafted,
                "spec_accept_token_num": sequence.accepted,
                "spec_accept_rate": sequence.accepted / max(1, sequence.drafted),
                "spec_accept_length": 1 + sequence.accepted / steps,
            }
        return Output(
            text=text,
            token_ids=tuple(output),
            finish_reason=self._reason(message is not None and message.calls),
            prompt_tokens=len(sequence.prompt),
            logprobs=tuple(self.logprobs) if sampling.return_logprob else None,
            input_logprobs=tuple(self.input_logprobs) if sampling.logprob_start_len >= 0 else None,
            error=self.error,
            meta_info=meta,
            message=message,
        )

    def _reason(self, calls: bool) -> str:
        reason = self.sequence.finish_reason or ABORT
        return TOOL_CALLS if calls and reason == STOP else reason

    def _whole(self) -> str:
        """All text; what nobody followed is made here, in one go."""
        sequence = self.sequence
        ended = sequence.ends_with_token
        if self._text is None and self.reading is not None and self.tokenizer is not None:
            self._text = self._made(self.tokenizer)
            for place, token in enumerate(sequence.output, start=1):
                self._text.take(token, ends=ended and place == len(sequence.output))
            self._text.end()
        if self._text is not None:
            return "".join(self._text.pieces)
        if self.tokenizer is None:
            return ""
        return whole_text(self.tokenizer, sequence.prompt, sequence.output, sequence.sampling, ended=ended)

    def _made(self, tokenizer: Tokenizer) -> AnswerText:
        """Its text, of which nothing has come yet."""
        sequence = self.sequence
        return AnswerText(
            tokenizer,
            sequence.prompt,
            sequence.sampling,
            self.on_text,
            reading=self.reading,
            told_event=self.on_event,
            call_id=self._call_id,
        )

    def _call_id(self, number: int, name: str) -> str:
        """The id of a call: the same when the request runs again with its seed, and no other's of a conversation."""
        sequence, calls = self.sequence, None if self.reading is None else self.reading.format.calls
        drawn = sequence.seed if sequence.sampling.temperature else None
        said = repr((drawn, number, name)).encode() + array("q", sequence.prompt).tobytes()
        digest = hashlib.sha256(said).hexdigest()
        return digest[:9] if calls is not None and calls.short_ids else f"call_{digest[:24]}"
