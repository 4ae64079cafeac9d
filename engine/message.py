"""An assistant's message: its content, its reasoning and its tool calls; and the events that it comes as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

CONTENT, REASONING, NAME, ARGUMENTS, DONE = "content", "reasoning_content", "name", "arguments", "done"


@dataclass(frozen=True)
class Event:
    """A piece of a message, final as soon as it is told.

    Attributes:
        kind: :data:`CONTENT` or :data:`REASONING`, whose text goes on; :data:`NAME`, with which a call begins, whole;
            :data:`ARGUMENTS`, which go on; :data:`DONE`, with which a call's arguments are complete.
        text: the piece.
        call: which call it is of, from 0; -1 for what is of none.
        id: of the call that begins.
    """

    kind: str
    text: str = ""
    call: int = -1
    id: str = ""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        id: its name within the conversation, which the tool's result repeats.
        arguments: JSON text of an object; the beginning of one where the answer was cut off.
        complete: whether it was not.
    """

    id: str
    name: str
    arguments: str = ""
    complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As OpenAI's messages have it, and as ``messages`` take it back."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class Message:
    """What an answer says.

    Attributes:
        content: its text without the rest; None where there is only the rest.
        reasoning_content: what the model thought before; None where it did not.
        tool_calls: in the order in which they were written.
    """

    content: str | None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def calls(self) -> bool:
        """Whether it calls tools, and every call is complete."""
        return bool(self.tool_calls) and all(call.complete for call in self.tool_calls)

    def as_dict(self) -> dict[str, Any]:
        """The message as a conversation goes on from it."""
        made: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content is not None:
            made["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            made["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return made


def joined(events: Sequence[Event]) -> list[Event]:
    """Events of which neighbours that go on with the same text are one."""
    made: list[Event] = []
    for event in events:
        last = made[-1] if made else None
        goes_on = event.kind in (CONTENT, REASONING, ARGUMENTS)
        if last is not None and goes_on and (last.kind, last.call) == (event.kind, event.call):
            made[-1] = replace(last, text=last.text + event.text)
        else:
            made.append(event)
    return made


def text_of(events: Sequence[Event], kind: str) -> str:
    """What events say of content, or of reasoning."""
    return "".join(event.text for event in events if event.kind == kind)


@dataclass(frozen=True)
class CallDelta:
    """How a call begins or goes on, in OpenAI's way: id and name once, then arguments.

    Attributes:
        index: which call of the message.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


def call_deltas(events: Sequence[Event]) -> tuple[CallDelta, ...]:
    """What events say of calls; neighbours of one call are one."""
    made: list[CallDelta] = []
    for event in events:
        if event.kind == NAME:
            made.append(CallDelta(event.call, event.id, event.text))
        elif event.kind == ARGUMENTS:
            if made and made[-1].index == event.call:
                made[-1] = replace(made[-1], arguments=made[-1].arguments + event.text)
            else:
                made.append(CallDelta(event.call, arguments=event.text))
    return tuple(made)


class Gathered:
    """A message while its events come."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {CONTENT: [], REASONING: []}
        self._calls: list[tuple[Event, list[str]]] = []
        self._done: set[int] = set()

    def take(self, event: Event) -> None:
        """The next event."""
        if event.kind == NAME:
            self._calls.append((event, []))
        elif event.kind == ARGUMENTS:
            self._calls[event.call][1].append(event.text)
        elif event.kind == DONE:
            self._done.add(event.call)
        else:
            self._texts[event.kind].append(event.text)

    def message(self) -> Message:
        """All of it so far."""
        content, reasoning = ("".join(self._texts[kind]) for kind in (CONTENT, REASONING))
        calls = tuple(
            ToolCall(event.id, event.text, "".join(parts), event.call in self._done)
            for event, parts in self._calls
        )
        return Message(content or (None if reasoning or calls else ""), reasoning or None, calls)
