"""Answers of ``/api/chat`` and ``/api/generate``, whole or line by line.

Source: Ollama's API reference, "Generate a chat message", "Generate a response" (https://docs.ollama.com/api).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from makeready.engine.output import TOOL_CALLS, Output, TokenLogprob
from makeready.engine.pieces import Piece
from makeready.engine.protocol.ollama.body import SAMPLING
from makeready.engine.protocol.openai.logprobs import chat_entries, ends_with_id
from makeready.engine.sequence import STOP
from makeready.engine.text.tokenizer import Tokenizer


class Lines:
    """The answer to one request while it is generated: objects, of which the last one is ``done``.

    Args:
        chat: of ``/api/chat``; else of ``/api/generate``.
        model: as the request named it.
    """

    def __init__(self, chat: bool, model: str, tokenizer: Tokenizer | None) -> None:
        self._chat, self._model, self._tokenizer = chat, model, tokenizer

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The lines that a piece becomes; calls come whole, before the last."""
        entries = self._entries(piece.logprobs, piece.output)
        if piece.reasoning_content or piece.content or entries:
            yield self.line(piece.content, piece.reasoning_content) | entries
        if piece.output is not None:
            calls = self._calls(piece.output)
            if calls:
                yield self.line(calls=calls)
            yield self.line() | self._end(piece.output)

    def whole(self, output: Output) -> dict[str, Any]:
        """All of it in one object."""
        made = self.line(output.content or "", output.reasoning_content or "", self._calls(output))
        return made | self._entries(output.logprobs or (), output) | self._end(output)

    def loaded(self) -> dict[str, Any]:
        """That the model is loaded, for who asked nothing else."""
        return self.line() | {"done": True, "done_reason": "load"}

    def line(
        self, content: str = "", thinking: str = "", calls: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """An object that is not the last one."""
        head = {"model": self._model, "created_at": timestamp(datetime.datetime.now(datetime.timezone.utc))}
        thought = {"thinking": thinking} if thinking else {}
        if not self._chat:
            return head | {"response": content} | thought | {"done": False}
        message: dict[str, Any] = {"role": "assistant", "content": content} | thought
        if calls:
            message["tool_calls"] = list(calls)
        return head | {"message": message, "done": False}

    def _calls(self, output: Output) -> list[dict[str, Any]]:
        """Calls with their arguments as objects; one that was cut off has none, and is not told."""
        return [
            {
                "id": call.id,
                "function": {
                    "index": index,
                    "name": call.name,
                    "arguments": json.loads(call.arguments or "{}"),
                },
            }
            for index, call in enumerate(output.tool_calls)
            if call.complete
        ]

    def _entries(self, tokens: Sequence[TokenLogprob], output: Output | None) -> dict[str, Any]:
        """Log-probabilities of all tokens but the one that ended the text."""
        tokens = tokens[:-1] if output is not None and ends_with_id(output) else tokens
        return {"logprobs": chat_entries(tokens, self._tokenizer)} if tokens else {}

    def _end(self, output: Output) -> dict[str, Any]:
        """Why it ended, tokens, and times in nanoseconds; what waited in the queue is in the total alone."""
        meta = output.meta_info
        total, queued = meta["e2e_latency"], meta["queue_time"]
        first = meta["time_to_first_token"]
        first = total if first is None else first
        return {
            "done": True,
            "done_reason": STOP if output.finish_reason == TOOL_CALLS else output.finish_reason,
            "total_duration": _nanoseconds(total),
            "load_duration": 0,
            "prompt_eval_count": output.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - queued),
            "eval_count": output.completion_tokens,
            "eval_duration": _nanoseconds(total - first),
        }


def error_object(message: str) -> dict[str, Any]:
    """An error, in the words of the request's options."""
    for theirs, ours in SAMPLING.items():
        if "_" in ours:
            message = re.sub(rf"\b{ours}\b", theirs, message)
    return {"error": message}


def timestamp(moment: datetime.datetime) -> str:
    """RFC 3339, in UTC."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
