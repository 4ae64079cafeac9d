"""The side of text: from what a caller asks to sequences of tokens, checked against a plan; no engine is needed.

Whoever has the engine in its own process (``LLM``) and whoever has it in another (the server) make requests alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makeready.engine.constraint import Constraint
from makeready.engine.conversation import Parsers
from makeready.engine.errors import RequestError
from makeready.engine.fields import boolean, whole
from makeready.engine.fields import text as field_text
from makeready.engine.generation_config import sampling_defaults
from makeready.engine.given import Sampling, ids_of, limit_is_models, params_of, sampling_of
from makeready.engine.protocol.asked import Ask
from makeready.engine.reply import AskedGrammar, Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.text.chat import read_template
from makeready.engine.text.formats.scan import Reading
from makeready.engine.text.grammar import ANY
from makeready.engine.text.lark import Markers
from makeready.engine.text.prompt import PromptTokenizer
from makeready.engine.text.tokenizer import Tokenizer, load_tokenizer
from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.plan.spec import Limits

PRIORITY = whole(-(2**63))
Constrain = Callable[[str, Any, str], Constraint]
"""Makes a constraint from what :class:`~makeready.engine.reply.Reply` says of one, which may be copied."""


@dataclass(frozen=True)
class Bounds:
    """What a plan says of the requests that it can run.

    Attributes:
        vocabulary: token ids go from 0 to this.
        steps: kinds of step that it has programs for.
    """

    limits: Limits
    vocabulary: int
    steps: Collection[str]


@dataclass(frozen=True)
class Defaults:
    """What requests that do not say otherwise ask for.

    Attributes:
        sampling: sampling fields. Without ``max_new_tokens`` among them each protocol has a limit of its own.
        template: variables of the chat template.
        add_special_tokens: put bos around texts where the tokenizer does.
        fit: ``max_new_tokens`` of ``sampling`` was chosen by nobody, and ends where the context does.
    """

    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add_special_tokens: bool = True
    fit: bool = False


class Front:
    """Makes replies, whose sequences any engine of the same plan can run.

    Args:
        checkpoint: whose tokenizer, templates and sampling values are read.
        bounds: of the plan.
        parsers: how the model writes tool calls and reasoning.
        chat_template, generation_config: as for :class:`makeready.engine.llm.LLM`.
        warn: told in a sentence of what may be not as expected with a prompt.

    Attributes:
        tokenizer: None where the checkpoint has none.
        generation_defaults: sampling fields that the model states.
        constrain: compiles grammars; None leaves them, as replies have them, to whoever runs the sequences.

    Raises:
        TextError, RequestError: what is read of the checkpoint is broken.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        bounds: Bounds,
        parsers: Parsers,
        *,
        chat_template: str | Path | None = None,
        generation_config: bool = True,
        warn: Callable[[str], None],
    ) -> None:
        self.checkpoint, self.bounds = checkpoint, bounds
        self.constrain: Constrain | None = None
        self._markers: Markers | None = None
        self._parsers = parsers
        self.tokenizer: Tokenizer | None = load_tokenizer(checkpoint)
        self._prompts = PromptTokenizer(self.tokenizer, checkpoint.path, bounds.limits.context_len, warn)
        if chat_template is not None:
            tokenizer = self.tokenizer_for("chat_template")
            tokenizer.chat_template = read_template(chat_template, tokenizer.chat_template)
        stated = sampling_defaults(checkpoint.generation_config) if generation_config else {}
        self.generation_defaults: Mapping[str, Any] = stated

    def tokenizer_for(self, purpose: str) -> Tokenizer:
        """The tokenizer, which ``purpose`` needs; raises :class:`RequestError` where there is none."""
        return self._prompts.tokenizer_for(purpose)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text that has to fit the context."""
        return self._prompts.encode(text, add_special_tokens)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The model's own end tokens: the tokenizer's, or the config's where there is none."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_ids
        stated = self.checkpoint.config.get("eos_token_id")
        named = self.checkpoint.generation_config.get("eos_token_id", stated)
        if named is None:
            return ()
        return tuple(named) if isinstance(named, list) else (named,)

    def asked(self, ask: Ask, defaults: Defaults) -> tuple[SamplingParams, list[Reply]]:
        """The replies to a body: the ``n`` samples of its first prompt, then those of the next.

        Raises:
            RequestError, TextError: it cannot be served; naming the limit or field.
        """
        asked = sampling_of(defaults.sampling, ask.sampling)
        chosen = "max_new_tokens" in (ask.sampling if defaults.fit else asked)
        if not chosen:
            own = (
                ask.max_new_tokens,
                defaults.sampling.get("max_new_tokens"),
            )  # the format's and the model's
            most = min((most for most in own if most is not None), default=self.bounds.limits.context_len)
            asked["max_new_tokens"] = most
        params = SamplingParams.from_mapping(asked)
        fit = ask.fit or not chosen
        replies: list[Reply] = []
        for prompt in ask.prompts:
            if ask.kind == "messages":
                chat = {**defaults.template, **ask.template, **ask.text, **ask.tools}
                replies += self.chat_replies(prompt, params, **ask.routing, fit=fit, **chat)
                continue
            special = ask.text.get("add_special_tokens", defaults.add_special_tokens)
            replies += self.replies(prompt, params, **ask.routing, add_special_tokens=special, fit=fit)
        return params, replies

    def rendered(
        self, messages: Any, add_special_tokens: Any = False, **template: Any
    ) -> tuple[list[int], Reading | None]:
        """Token ids of a conversation, and how its answers are to be read; see :meth:`LLM.chat`."""
        special = boolean("add_special_tokens", add_special_tokens)
        text, reading = self._parsers.prompt(self.tokenizer_for("chat"), messages, **template)
        return self.encode(text, special), reading

    def chat_replies(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling,
        *,
        extra_key: str = "",
        priority: int = 0,
        fit: bool = False,
        **template: Any,
    ) -> list[Reply]:
        """:meth:`replies` to a conversation, whose reasoning and tool calls are told apart."""
        ids, reading = self.rendered(messages, **template)
        return self.replies(ids, sampling, extra_key=extra_key, priority=priority, fit=fit, reading=reading)

    def replies(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        extra_key: str = "",
        priority: int = 0,
        add_special_tokens: bool = True,
        fit: bool = False,
        reading: Reading | None = None,
    ) -> list[Reply]:
        """The ``n`` replies to one prompt, checked but not queued; see :meth:`LLM.generate` for the rest.

        Args:
            fit: lower ``max_new_tokens`` to what the context has room for; as without ``sampling``.
            reading: how the message of an answer is written, where it is to be read.

        Raises:
            RequestError, TextError: the prompt or the parameters are beyond what the plan allows.
        """
        limits, vocabulary = self.bounds.limits, self.bounds.vocabulary
        extra_key, priority = field_text("extra_key", extra_key), PRIORITY("priority", priority)
        special = boolean("add_special_tokens", add_special_tokens)
        if isinstance(prompt, str):
            ids = self.encode(prompt, special)
            if not ids:
                raise RequestError("the prompt is empty; give at least one token")
        else:
            ids = ids_of(prompt, vocabulary)
        fit = fit or limit_is_models(sampling, self.generation_defaults)
        sampling = params_of(sampling, self.generation_defaults)
        if fit:
            room = max(1, limits.context_len - len(ids))
            sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        sampling.check(limits, vocabulary, self.bounds.steps)
        if sampling.logprob_start_len >= len(ids):
            raise RequestError(
                f"logprob_start_len={sampling.logprob_start_len} is beyond the prompt's {len(ids)} tokens; lower it"
            )
        if self.tokenizer is None and (sampling.stop or sampling.stop_regex):
            raise RequestError(
                "stop strings need a tokenizer, and the checkpoint has none; use stop_token_ids"
            )
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= frozenset(self.end_ids)
        if sampling.min_new_tokens and len(ends) > limits.max_stop_ids:
            raise RequestError(
                f"min_new_tokens holds back {len(ends)} end tokens, the plan allows "
                f"{limits.max_stop_ids}; give fewer stop_token_ids"
            )
        grammar = self._grammar(sampling, reading)
        constraint = None if grammar is None or self.constrain is None else self.constrain(*grammar)
        return [
            Reply(
                TokenSequence(
                    ids,
                    sampling,
                    seed,
                    ends,
                    extra_key,
                    priority,
                    None if constraint is None else constraint.copy(),
                ),
                self.tokenizer,
                reading,
                grammar,
            )
            for seed in map(sampling.seed, range(sampling.n))
        ]

    def _grammar(self, sampling: SamplingParams, reading: Reading | None) -> AskedGrammar | None:
        """What an output has to follow: a field of ``sampling``, behind reasoning; calls, forced or strict."""
        asked, message = sampling.grammar, None if reading is None else reading.grammar
        if asked is None and (message is None or not message.binds):
            return None
        if asked is not None and message is not None and message.forced:
            raise RequestError(f"{asked[0]} and tool_choice cannot both hold; give one of them")
        tokenizer = self.tokenizer_for("an output that follows a grammar")
        kind, value = asked or ANY
        if message is None:
            return kind, value, ""
        if self._markers is None:
            self._markers = Markers(tokenizer, self.end_ids)
        return kind, value, message.lark(self._markers, asked is not None)
