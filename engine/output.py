"""What a caller gets for a sample: text, tokens, log-probabilities, figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.message import Message, ToolCall
from makeready.engine.sequence import ERROR

# Why an answer ended that calls tools, in place of ``stop``.
TOOL_CALLS = "tool_calls"


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
        text: all generated text; empty where there is no tokenizer.
        token_ids: generated tokens, the one that ended them included.
        finish_reason: ``stop`` (end token, stop string or id), ``tool_calls`` (the same, behind calls that are all
            complete), ``length``, ``abort`` or ``error``.
        logprobs: one entry a generated token, where asked for.
        input_logprobs: one entry a token of the prompt from ``logprob_start_len`` on, where asked for.
        prompt_tokens, completion_tokens: how many.
        error: why it was refused, or could not go on, where it was so.
        meta_info: the same figures under SGLang's names, the seed that was used, and times in seconds; there is
            no ``time_to_first_token`` where no token came. Its reason is ``stop`` where tools are called. Where
            drafts were verified, ``spec_verify_ct`` says in how many steps, ``spec_accept_length`` how many tokens
            these brought on average, ``spec_draft_token_num`` how many were guessed and ``spec_accept_token_num``
            how many of them were right.
        message: what the text says, reasoning and calls apart; None for what is no chat, or of a model whose chat
            template tells of neither.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    input_logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    meta_info: Mapping[str, Any] = field(default_factory=dict)
    message: Message | None = None

    @property
    def content(self) -> str | None:
        """The text without reasoning and calls; None where there is nothing else."""
        return self.text if self.message is None else self.message.content

    @property
    def reasoning_content(self) -> str | None:
        """What the model thought before it answered; None where it did not."""
        return None if self.message is None else self.message.reasoning_content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Calls of tools, in the order in which they were written."""
        return () if self.message is None else self.message.tool_calls

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
