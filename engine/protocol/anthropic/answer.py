"""Answers of ``/v1/messages``: a message, and the events that it comes as. Both are made in one way.

Source: Anthropic's API reference, "Create a Message", "Streaming Messages" and "Errors"
(https://docs.anthropic.com/en/api/messages, .../messages-streaming, .../errors).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from makeready.engine.message import CallDelta
from makeready.engine.output import TOOL_CALLS, Output
from makeready.engine.pieces import Piece
from makeready.engine.protocol.anthropic.partial import beginning_of
from makeready.engine.sequence import STOP

_TEXT, _THINKING, _CALL = "text", "thinking", "tool_use"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# Our names of fields in errors → theirs.
_RENAMED = {
    r"\bmax_new_tokens\b": "max_tokens",
    r"\bjson_schema\b": "output_config.format",
    r"^stop\b": "stop_sequences",
}


class MessageEvents:
    """One message while it is generated.

    Args:
        identity: of the request.
        body: that asked.
        prompt_tokens: of the prompt.

    Attributes:
        message: all of it so far.
    """

    def __init__(self, identity: str, body: Mapping[str, Any], prompt_tokens: int) -> None:
        self._most = body["max_tokens"]
        self._stops = body.get("stop_sequences") or ()
        self._call, self._arguments = -1, ""
        self.message: dict[str, Any] = {
            "id": f"msg_{identity}",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # What of the prompt was cached is known in the end.
            "usage": _usage(prompt_tokens, 0, 0),
        }

    def begin(self) -> Iterator[dict[str, Any]]:
        """What comes before all else."""
        yield {"type": "message_start", "message": {**self.message, "content": []}}
        yield ping()

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events that a piece becomes."""
        if piece.reasoning_content:
            yield from self._write(_THINKING, piece.reasoning_content)
        if piece.content:
            yield from self._write(_TEXT, piece.content)
        for call in piece.tool_calls:
            yield from self._go_on(call)
        if piece.output is not None:
            yield from self._end(piece.output)

    def _write(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """Text or thoughts; the field, the kind of block and of its deltas have one name."""
        blocks = self.message["content"]
        if not blocks or blocks[-1]["type"] != kind:
            yield from self._close()
            yield self._open({"type": kind, kind: ""} | ({"signature": ""} if kind == _THINKING else {}))
        blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _go_on(self, call: CallDelta) -> Iterator[dict[str, Any]]:
        if call.index != self._call:
            yield from self._close()
            self._call, self._arguments = call.index, ""
            yield self._open({"type": _CALL, "id": call.id, "name": call.name, "input": {}})
        if call.arguments:
            self._arguments += call.arguments
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def _open(self, block: dict[str, Any]) -> dict[str, Any]:
        blocks = self.message["content"]
        blocks.append(block)
        return {"type": "content_block_start", "index": len(blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.message["content"]) - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        """The block that is written is complete."""
        blocks = self.message["content"]
        if not blocks:
            return
        block = blocks[-1]
        if block["type"] == _THINKING:
            block["signature"] = _signature(block[_THINKING])
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        elif block["type"] == _CALL:
            block["input"] = beginning_of(self._arguments)
        yield {"type": "content_block_stop", "index": len(blocks) - 1}

    def _end(self, output: Output) -> Iterator[dict[str, Any]]:
        yield from self._close()
        reason, stop = self._reason(output)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        cached = output.meta_info["cached_tokens"]
        usage = _usage(output.prompt_tokens, cached, output.completion_tokens)
        self.message |= {**delta, "usage": usage}
        yield {"type": "message_delta", "delta": delta, "usage": usage}
        yield {"type": "message_stop"}

    def _reason(self, output: Output) -> tuple[str, str | None]:
        if output.finish_reason == TOOL_CALLS:
            return "tool_use", None
        if output.finish_reason == STOP:
            matched = output.meta_info["finish_reason"].get("matched")
            return ("stop_sequence", matched) if matched in self._stops else ("end_turn", None)
        # Cut off; who ended it from outside is among these, for which there is no name.
        within = output.completion_tokens < self._most and output.finish_reason != "abort"
        return "model_context_window_exceeded" if within else "max_tokens", None


def ping() -> dict[str, Any]:
    """Says that the stream is alive."""
    return {"type": "ping"}


def error_object(status: int, message: str, request_id: str | None = None) -> dict[str, Any]:
    """An error of an HTTP status, in the words of the request's fields."""
    if status == 400:
        for pattern, theirs in _RENAMED.items():
            message = re.sub(pattern, theirs, message)
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def _usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """Tokens, of which the API counts those that were cached apart."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }


def _signature(thought: str) -> str:
    """A digest: clients keep thoughts that have a signature. We do not ask for it when they come back."""
    return base64.b64encode(hashlib.sha256(thought.encode()).digest()).decode()
