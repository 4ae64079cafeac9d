"""What a request asks of generation, with SGLang's field names and meanings."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from makeready.engine import fields as fields_module
from makeready.engine.errors import RequestError
from makeready.engine.fields import (
    biases,
    boolean,
    filled,
    json_object,
    number,
    optional,
    schema,
    texts,
    token_ids,
    whole,
)
from makeready.graphs.plan.spec import INPUT_LOGPROBS, Limits


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
        json_schema: the output is JSON of this schema: an object, or its text. What cannot be enforced is refused.
        regex: the output matches this pattern as a whole (Rust's syntax: no lookaround, no references).
        ebnf: the output follows this grammar in llama.cpp's GBNF.
        lark: the output follows this grammar in llguidance's dialect of Lark.
        choice: the output is one of these texts.
        structural_tag: the output is text with parts of a form, as xgrammar describes them: an object, or its text.
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
    json_schema: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    lark: str | None = None
    choice: Sequence[str] = ()
    structural_tag: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
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

        asked = [name for name in GRAMMARS if getattr(self, name) not in (None, ())]
        if len(asked) > 1:
            raise RequestError(f"{asked[0]} and {asked[1]} cannot both hold; give one of them")
        if asked and self.max_new_tokens == 0:
            raise RequestError(f"{asked[0]} needs an output; max_new_tokens=0 asks for none")

    @property
    def grammar(self) -> tuple[str, Any] | None:
        """Name and value of the one field of :data:`GRAMMARS` that is set; None where none is."""
        asked = ((name, getattr(self, name)) for name in GRAMMARS)
        return next(((name, value) for name, value in asked if value not in (None, ())), None)

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Parameters from a row's fields, of which those that are None are as if they were not there.

        Raises:
            RequestError: a field is unknown, or its value of the wrong type or out of range.
        """
        unknown = sorted(str(name) for name in fields if name not in CHECKS)
        if unknown:
            close = fields_module.meant(unknown[0], CHECKS)
            raise RequestError(
                f"there is no sampling field {fields_module.shown(unknown[0])}"
                + (f"; did you mean {close}" if close else f"; fields are {', '.join(sorted(CHECKS))}")
            )
        return cls(**{name: value for name, value in fields.items() if value is not None})

    def check(self, limits: Limits, vocabulary: int, steps: Collection[str]) -> None:
        """Hold the request to what a plan was made for.

        Args:
            limits: of the plan.
            vocabulary: ids go from 0 to this.
            steps: kinds of step that the plan has programs for.

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
        if self.logprob_start_len >= 0 and INPUT_LOGPROBS not in steps:
            enough = min(limits.max_tokens, max(512, limits.max_rows))
            raise RequestError(
                "logprob_start_len asks for log-probabilities of the prompt, for which the plan has no programs; "
                f"leave it out, or recompile with plan.max_logprob_tokens={enough}"
            )
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in ids:
                if not 0 <= token < vocabulary:
                    raise RequestError(
                        f"{name} has token id {fields_module.shown(token)}; "
                        f"the vocabulary ends at {vocabulary - 1}"
                    )

    def seed(self, sample: int) -> int:
        """Seed of the i-th sample: the request's own for the first, others far from it."""
        first = secrets.randbits(63) if self.sampling_seed is None else self.sampling_seed
        return (first + sample * 0x9E3779B97F4A7C15) % 2**63  # odd constant: no two samples below 2**63 alike


GRAMMARS = ("json_schema", "regex", "ebnf", "lark", "choice", "structural_tag")

_MOST_BIAS = 1e6  # decides any choice, and is far from the end of float32
MOST_STOPS, LONGEST_STOP = 128, 1024  # every token's text is held against all of them
MOST_PATTERNS, LONGEST_PATTERN = 16, 1024
MOST_CHOICES, LONGEST_CHOICE = 100_000, 10_000

# Every field: what it may hold. The only place that knows; rows, OpenAI's bodies and the command line come here.
CHECKS: Mapping[str, fields_module.Checker] = {
    "max_new_tokens": whole(0),
    "min_new_tokens": whole(0),
    "temperature": number(0, 1e4),
    "top_k": whole(-1, 2**31 - 1),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(1e-6, 1e6),
    "logit_bias": biases(_MOST_BIAS),
    "stop": texts(MOST_STOPS, LONGEST_STOP),
    "stop_token_ids": token_ids,
    "stop_regex": texts(MOST_PATTERNS, LONGEST_PATTERN),
    "ignore_eos": boolean,
    "n": whole(1, 1024),
    "sampling_seed": optional(whole(0)),
    "skip_special_tokens": boolean,
    "no_stop_trim": boolean,
    "return_logprob": boolean,
    "logprob_start_len": whole(-1),
    "top_logprobs_num": whole(0),
    "json_schema": optional(schema),
    "regex": optional(filled),
    "ebnf": optional(filled),
    "lark": optional(filled),
    "choice": texts(MOST_CHOICES, LONGEST_CHOICE),
    "structural_tag": optional(json_object),
}
