"""Answers of ``/v1/responses``: a ``response`` object, and the events that it comes as. Both are made in one way.

Source: OpenAI's API reference, "The Response object" and "Streaming events"
(https://platform.openai.com/docs/api-reference/responses/object, .../responses-streaming).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from makeready.engine.message import CallDelta
from makeready.engine.output import Output
from makeready.engine.pieces import Piece
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ABORT, LENGTH
from makeready.engine.text.tokenizer import Tokenizer

_MESSAGE, _REASONING, _CALL = "message", "reasoning", "function_call"
# Of a part of an item: its type, and what its events are called.
_PARTS = {_MESSAGE: ("output_text", "output_text"), _REASONING: ("reasoning_text", "reasoning_text")}
_ECHOED = (
    "instructions",
    "metadata",
    "user",
    "max_output_tokens",
    "text",
    "reasoning",
    "tools",
    "tool_choice",
)


class ResponseEvents:
    """One response while it is generated.

    Args:
        identity: of the request.
        body: that asked.
        params: what is sampled with.
    """

    def __init__(
        self,
        identity: str,
        body: Mapping[str, Any],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._identity, self._tokenizer = identity, tokenizer
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._calls: dict[int, int] = {}  # number of a call → of its item
        self._open: int | None = None
        echoed = {name: body[name] for name in _ECHOED if body.get(name) is not None}
        self.response: dict[str, Any] = {
            "id": f"resp_{identity}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": body["model"],
            "output": [],
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            **echoed,
        }

    def begin(self) -> Iterator[dict[str, Any]]:
        """What comes before all else."""
        yield self._event("response.created", response=dict(self.response))
        yield self._event("response.in_progress", response=dict(self.response))

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events that a piece becomes."""
        for kind, text in ((_REASONING, piece.reasoning_content), (_MESSAGE, piece.content)):
            if text:
                yield from self._write(kind, text)
        for call in piece.tool_calls:
            yield from self._call(call)
        if piece.output is not None:
            yield from self._end(piece.output)

    def _write(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        part, name = _PARTS[kind]
        if self._open is None or self._items[self._open]["type"] != kind:
            yield from self._close()
            item: dict[str, Any] = {"type": kind, "status": "in_progress", "content": []}
            item |= {"role": "assistant"} if kind == _MESSAGE else {"summary": []}
            yield self._add(item)
            if kind == _MESSAGE:
                yield self._of_part("response.content_part.added", part=_part(part, ""))
            item["content"] = [_part(part, "")]
        assert self._open is not None
        self._items[self._open]["content"][0]["text"] += text
        more = {"logprobs": []} if kind == _MESSAGE else {}
        yield self._of_part(f"response.{name}.delta", delta=text, **more)

    def _call(self, call: CallDelta) -> Iterator[dict[str, Any]]:
        if call.index not in self._calls:
            yield from self._close()
            self._calls[call.index] = len(self._items)
            item = {
                "type": _CALL,
                "status": "in_progress",
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
            }
            yield self._add(item)
        if call.arguments:
            place = self._calls[call.index]
            self._items[place]["arguments"] += call.arguments
            item_id = self._items[place]["id"]
            yield self._event(
                "response.function_call_arguments.delta",
                item_id=item_id,
                output_index=place,
                delta=call.arguments,
            )

    def _add(self, item: dict[str, Any]) -> dict[str, Any]:
        self._open = place = len(self._items)
        prefix = {_MESSAGE: "msg", _REASONING: "rs", _CALL: "fc"}[item["type"]]
        item["id"] = f"{prefix}_{self._identity}_{place}"
        self._items.append(item)
        return self._event("response.output_item.added", output_index=place, item=dict(item))

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """The item that is written is complete."""
        if self._open is None:
            return
        place, item = self._open, self._items[self._open]
        item["status"] = status
        if item["type"] == _CALL:
            yield self._event(
                "response.function_call_arguments.done",
                item_id=item["id"],
                output_index=place,
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            (part,) = item["content"]
            more = {"logprobs": []} if item["type"] == _MESSAGE else {}
            yield self._of_part(f"response.{_PARTS[item['type']][1]}.done", text=part["text"], **more)
            if item["type"] == _MESSAGE:
                yield self._of_part("response.content_part.done", part=part)
        self._open = None
        yield self._event("response.output_item.done", output_index=place, item=dict(item))

    def _end(self, output: Output) -> Iterator[dict[str, Any]]:
        cut = output.finish_reason in (LENGTH, ABORT)
        yield from self._close("incomplete" if cut else "completed")
        self.response |= {"output": self._items, "status": "completed", "usage": self._usage(output)}
        if output.finish_reason == LENGTH:
            details = {"reason": "max_output_tokens"}
            self.response |= {"status": "incomplete", "incomplete_details": details}
        elif output.finish_reason == ABORT:
            self.response["status"] = "cancelled"
        name = "response.incomplete" if cut else "response.completed"
        yield self._event(name, response=dict(self.response))

    def _usage(self, output: Output) -> dict[str, Any]:
        """Reasoning is counted as its text is tokenized."""
        thought, tokenizer = output.reasoning_content, self._tokenizer
        reasoning = 0
        if thought and tokenizer is not None:
            reasoning = len(tokenizer.encode(thought, add_special_tokens=False))
        return {
            "input_tokens": output.prompt_tokens,
            "input_tokens_details": {"cached_tokens": output.meta_info["cached_tokens"]},
            "output_tokens": output.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": min(reasoning, output.completion_tokens)},
            "total_tokens": output.prompt_tokens + output.completion_tokens,
        }

    def _of_part(self, name: str, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        item_id = self._items[self._open]["id"]
        return self._event(name, item_id=item_id, output_index=self._open, content_index=0, **fields)

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": name, "sequence_number": self._number - 1, **fields}


def _part(kind: str, text: str) -> dict[str, Any]:
    made: dict[str, Any] = {"type": kind, "text": text}
    return made | {"annotations": [], "logprobs": []} if kind == "output_text" else made
