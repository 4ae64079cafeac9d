"""What a request asks of generation, with SGLang's field names and meanings."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.errors import RequestError
from makeready.graphs.spec import Limits


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: most tokens to generate; 0 only computes log-probabilities of the prompt.
        min_new_tokens: end and stop tokens are held back until so many were generated.
        temperature: 0 always takes the most probable token.
        top_k: sample among the k most probable; 0 or -1 for all.
        top_p: sample among the most probable that together have this much probability.
        min_p: sample among those with at least this fraction of the most probable one's probability.
        frequency_penalty: taken from a token's logit once for every time it was generated.
        presence_penalty: taken from the logit of every token that was generated.
        repetition_penalty: divides positive and multiplies negative logits of prompt and output tokens.
        logit_bias: added to the logits of token ids.
        stop: strings that end the text, the text of special tokens among them; they are cut off unless
            ``no_stop_trim``.
        stop_token_ids: token ids that end it, besides the model's own end tokens.
        stop_regex: patterns that end it.
        ignore_eos: generate past the model's end tokens.
        n: samples of each prompt; sample i draws from its own stream.
        sampling_seed: with the position it determines every random choice; None draws one, which the
            output reports.
        skip_special_tokens: leave special tokens out of the text.
        no_stop_trim: keep the stop string or stop token in the text.
        return_logprob: report the log-probability of every generated token.
        logprob_start_len: report those of the prompt's tokens as well, from this one on; -1 for none. The
            first token of all has none.
        top_logprobs_num: report so many most probable alternatives as well.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    stop_regex: str | Sequence[str] = ()
    ignore_eos: bool = False
    n: int = 1
    sampling_seed: int | None = None
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
                raise RequestError(f"{name}={value!r} must be a number")
            if not low <= value <= high:
                raise RequestError(f"{name}={value} is out of range; it must be {_range(low, high)}")
        for name in _WHOLE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise RequestError(f"{name}={value!r} must be a whole number")
        if self.sampling_seed is not None and (
            not isinstance(self.sampling_seed, int) or not 0 <= self.sampling_seed < 2**63
        ):
            raise RequestError(
                f"sampling_seed={self.sampling_seed!r} must be a whole number from 0 to 2**63 - 1"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}; lower it"
            )
        if self.top_p == 0:
            raise RequestError("top_p=0 leaves no token to choose; use temperature=0 for greedy decoding")
        if self.top_logprobs_num and not self.return_logprob:
            raise RequestError("top_logprobs_num needs return_logprob=true")
        if self.logprob_start_len >= 0 and not self.return_logprob:
            raise RequestError("logprob_start_len needs return_logprob=true")
        if self.max_new_tokens == 0 and self.logprob_start_len < 0:
            raise RequestError(
                "max_new_tokens=0 asks for nothing; it must be at least 1, or logprob_start_len at least 0"
            )
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_regex", _strings("stop_regex", self.stop_regex))
        object.__setattr__(self, "stop_token_ids", tuple(_ids("stop_token_ids", self.stop_token_ids)))
        bias = {_id("logit_bias", key): value for key, value in self.logit_bias.items()}
        for value in bias.values():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST_BIAS:
                raise RequestError(
                    f"logit_bias={value!r} must be a number from {-_MOST_BIAS:g} to {_MOST_BIAS:g}"
                )
        object.__setattr__(self, "logit_bias", bias)

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Parameters from a row's fields.

        Raises:
            RequestError: a field is unknown or its value is out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise RequestError(
                f"there is no sampling field {unknown[0]!r}; fields are {', '.join(sorted(known))}"
            )
        try:
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise RequestError(f"sampling fields cannot be read: {error}") from None

    def check(self, limits: Limits, vocabulary: int) -> None:
        """Hold the request to what a plan was made for.

        Raises:
            RequestError: more than the plan's programs can take; names the limit and the remedy.
        """
        for name, count, most in (
            ("stop_token_ids", len(self.stop_token_ids), limits.max_stop_ids),
            ("logit_bias", len(self.logit_bias), limits.max_logit_bias),
            ("top_logprobs_num", self.top_logprobs_num, limits.max_top_logprobs),
        ):
            if count > most:
                raise RequestError(f"{name} asks for {count} entries, the plan allows {most}; ask for fewer")
        if self.logprob_start_len >= 0 and not limits.max_logprob_tokens:
            enough = min(limits.max_tokens, max(512, limits.max_rows))
            raise RequestError(
                "logprob_start_len asks for log-probabilities of the prompt, for which the plan has no programs; "
                f"leave it out, or recompile with plan.max_logprob_tokens={enough}"
            )
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in ids:
                if not 0 <= token < vocabulary:
                    raise RequestError(
                        f"{name} has token id {token}; the vocabulary ends at {vocabulary - 1}"
                    )

    def seed(self, sample: int) -> int:
        """Seed of the i-th sample: the request's own for the first, others far from it."""
        first = secrets.randbits(63) if self.sampling_seed is None else self.sampling_seed
        return (first + sample * 0x9E3779B97F4A7C15) % 2**63  # odd constant: no two samples below 2**63 alike


_INF = math.inf
_MOST_BIAS = 1e6  # decides any choice, and is far from the end of float32
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_new_tokens", 0, _INF),
    ("min_new_tokens", 0, _INF),
    ("temperature", 0, 1e4),
    ("top_k", -1, 2**31 - 1),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("frequency_penalty", -2, 2),
    ("presence_penalty", -2, 2),
    ("repetition_penalty", 1e-6, 1e6),
    ("n", 1, 1024),
    ("logprob_start_len", -1, _INF),
    ("top_logprobs_num", 0, _INF),
)
_WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "n", "logprob_start_len", "top_logprobs_num")


def _range(low: float, high: float) -> str:
    return f"at least {low:g}" if high == _INF else f"from {low:g} to {high:g}"


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else tuple(value or ())
    if any(not isinstance(v, str) or not v for v in values):
        raise RequestError(f"{name} must be a non-empty string or a list of them")
    return values


def _id(name: str, value: Any) -> int:
    """A token id; JSON objects have theirs as text."""
    try:
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return int(value)
    except ValueError:
        pass
    raise RequestError(f"{name} has {value!r}, which is no token id")


def _ids(name: str, values: Any) -> list[int]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise RequestError(f"{name} must be a list of token ids")
    return [_id(name, value) for value in values]
