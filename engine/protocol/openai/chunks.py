"""Streamed answers to requests for chat and completions, chunk by chunk.

Source of the shapes: OpenAI's API reference, "The chat completion chunk object" and "The completion object"
(https://platform.openai.com/docs/api-reference/chat/streaming, .../completions/object). Deltas that are joined make
the plain answer. ``continuous_usage_stats`` is vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from makeready.engine.message import CallDelta
from makeready.engine.output import Output, TokenLogprob
from makeready.engine.pieces import Piece
from makeready.engine.protocol.asked import AskError, kind_of
from makeready.engine.protocol.openai.answer import echo_of, stop_of, usage_of
from makeready.engine.protocol.openai.logprobs import CompletionLogprobs, chat_entries, ends_with_id
from makeready.engine.reply import Reply
from makeready.engine.text.tokenizer import Tokenizer

FIELDS = ("stream", "stream_options")
_OPTIONS = ("include_usage", "continuous_usage_stats")


@dataclass(frozen=True)
class Streaming:
    """How an answer is wanted.

    Attributes:
        stream: chunk by chunk.
        include_usage: a last chunk says how many tokens it took.
        continuous_usage_stats: and so does every one before it, for the tokens so far.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage_stats: bool = False


def streaming_of(body: Mapping[str, Any]) -> Streaming:
    """What a body says of streaming.

    Raises:
        AskError: a field is of the wrong type, or makes no sense.
    """
    stream, options = body.get("stream"), body.get("stream_options")
    if not isinstance(stream, bool | None):
        raise AskError(f"stream must be true or false, not {kind_of(stream)}", "stream")
    if options is None:
        return Streaming(bool(stream))
    if not isinstance(options, Mapping):
        raise AskError(f"stream_options must be an object, not {kind_of(options)}", "stream_options")
    if not stream:
        raise AskError("stream_options is for stream: true; leave it out", "stream_options")
    chosen = {name: options[name] for name in _OPTIONS if options.get(name) is not None}
    for name, value in chosen.items():
        if not isinstance(value, bool):
            raise AskError(
                f"stream_options.{name} must be true or false, not {kind_of(value)}", "stream_options"
            )
    return Streaming(True, **chosen)


class _Chunks:
    """What both kinds of stream have in common.

    Args:
        head: fields that all chunks have.
        replies: of the request, ``samples`` of each prompt.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        streaming: Streaming,
        replies: Sequence[Reply],
        samples: int,
    ) -> None:
        self._head, self._streaming = dict(head), streaming
        self._replies, self._samples = replies, samples
        self._outputs: dict[int, Output] = {}
        self._counts = [0] * len(replies)  # tokens of what was told, which replies may be ahead of

    def take(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """The chunks that pieces become."""
        for piece in pieces:
            self._counts[piece.index] += len(piece.token_ids)
            if piece.output is not None:
                self._outputs[piece.index] = piece.output
                self._counts[piece.index] = piece.output.completion_tokens
            for choice in self._choices(piece):
                yield self._chunk([choice])

    def end(self) -> Iterator[dict[str, Any]]:
        """What comes behind the last piece."""
        if self._streaming.include_usage:
            outputs = [self._outputs[index] for index in range(len(self._replies))]
            yield self._head | {"choices": [], "usage": usage_of(outputs, self._samples)}

    def _choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._head | {"choices": choices}
        if self._streaming.continuous_usage_stats:
            return chunk | {"usage": self._usage_so_far()}
        return chunk | {"usage": None} if self._streaming.include_usage else chunk

    def _usage_so_far(self) -> dict[str, Any]:
        prompt = sum(len(reply.sequence.prompt) for reply in self._replies[:: self._samples])
        completion = sum(self._counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


class ChatChunks(_Chunks):
    """Chunks of a chat."""

    def __init__(
        self,
        head: Mapping[str, Any],
        streaming: Streaming,
        replies: Sequence[Reply],
        samples: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(head, streaming, replies, samples)
        self._tokenizer = tokenizer
        self._begun: set[int] = set()

    def _choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield _choice(piece.index, {"role": "assistant", "content": "", "refusal": None})
        delta: dict[str, Any] = {}
        if piece.reasoning_content:
            delta |= dict.fromkeys(("reasoning_content", "reasoning"), piece.reasoning_content)
        if piece.content:
            delta["content"] = piece.content
        if piece.tool_calls:
            delta["tool_calls"] = [_call(call) for call in piece.tool_calls]
        entries = None
        if self._replies[piece.index].sequence.sampling.return_logprob:
            tokens = _of_text(piece.logprobs, piece.output)
            entries = {"content": chat_entries(tokens, self._tokenizer), "refusal": None} if tokens else None
        if delta or entries:
            yield _choice(piece.index, delta or {"content": ""}, entries)
        if piece.output is not None:
            ends = stop_of(piece.output, self._replies[piece.index].sequence.sampling)
            yield _choice(piece.index, {}, finish_reason=piece.output.finish_reason) | ends


class CompletionChunks(_Chunks):
    """Chunks of completions, each of which begins with its prompt where that is wanted (``echo``)."""

    def __init__(
        self,
        head: Mapping[str, Any],
        streaming: Streaming,
        replies: Sequence[Reply],
        samples: int,
        tokenizer: Tokenizer | None,
        body: Mapping[str, Any],
    ) -> None:
        super().__init__(head, streaming, replies, samples)
        self._tokenizer, self._body = tokenizer, body
        self._begun: dict[int, CompletionLogprobs | None] = {}

    def _choices(self, piece: Piece) -> Iterator[dict[str, Any]]:
        index, reply = piece.index, self._replies[piece.index]
        echo: str | Sequence[int] = ""
        text, made = piece.text, dict[str, Any]()
        ids: list[int] = list(piece.token_ids)
        if index not in self._begun:
            echo, begins = echo_of(self._body, index // self._samples, self._tokenizer)
            text, ids = begins + text, [*(() if isinstance(echo, str) else echo), *ids]
            wanted = reply.sequence.sampling.return_logprob
            self._begun[index] = (
                CompletionLogprobs(
                    self._tokenizer,
                    begins,
                    echo,
                    reply.input_logprobs,
                    reply.sequence.sampling.skip_special_tokens,
                )
                if wanted
                else None
            )
        if self._tokenizer is None:
            made["token_ids"] = ids
        writer, logprobs = self._begun[index], None
        if writer is not None:
            final = None if piece.output is None else piece.output.text
            logprobs = writer.take(_of_text(piece.logprobs, piece.output), piece.text, final)
        reason = None if piece.output is None else piece.output.finish_reason
        if text or logprobs or reason or made.get("token_ids"):
            ends = {} if piece.output is None else stop_of(piece.output, reply.sequence.sampling)
            yield made | {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason} | ends


def _of_text(tokens: Sequence[TokenLogprob], output: Output | None) -> Sequence[TokenLogprob]:
    """All but the token that ended the text, which comes with the output."""
    return tokens[:-1] if output is not None and ends_with_id(output) else tokens


def _call(call: CallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, **function},
    }


def _choice(
    index: int, delta: Mapping[str, Any], logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def head_of(chat: bool, identity: str, model: str) -> dict[str, Any]:
    """Fields that all chunks of an answer have."""
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{identity}",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
    }
