"""What steps add to the samples of a request, for whoever reads along: as often as they like, nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from makeready.engine.message import CONTENT, REASONING, CallDelta, Event, call_deltas, text_of
from makeready.engine.output import Output, TokenLogprob
from makeready.engine.reply import Reply


@dataclass(frozen=True)
class Piece:
    """What was added to a sample since the last look at it.

    Attributes:
        index: which of the request's samples.
        text: that became final; empty while a stop string may be about to end it.
        token_ids: new ones.
        output: the whole, with the sample's last piece.
        content, reasoning_content: what the text says; of a plain prompt all of it is content.
        tool_calls: calls that begin, and arguments that go on.
        logprobs: one entry a new token, where asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    output: Output | None = None
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[CallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Samples:
    """The samples of a request while they are made.

    What nobody looked at yet comes as one piece: a slow reader costs the text of its answer and no more.

    Args:
        replies: told of nobody else.

    Attributes:
        left: samples whose last piece was not given.
    """

    def __init__(self, replies: Sequence[Reply]) -> None:
        self.replies = replies
        self.left = set(range(len(replies)))
        self._texts: list[list[str]] = [[] for _ in replies]
        self._events: list[list[Event]] = [[] for _ in replies]
        self._sent = [0] * len(replies)
        for reply, texts, events in zip(replies, self._texts, self._events, strict=True):
            reply.on_text, reply.on_event = texts.append, events.append

    def pieces(self) -> Iterator[Piece]:
        """What is new of each sample."""
        for index in sorted(self.left):
            reply, texts, told = self.replies[index], self._texts[index], self._events[index]
            output, sent = reply.sequence.output, self._sent[index]
            if not (reply.done or texts or len(output) > sent):
                continue
            text, texts[:] = "".join(texts), ()
            events, told[:] = tuple(told), ()
            self._sent[index] = len(output)
            if reply.done:
                self.left.remove(index)
            yield Piece(
                index,
                text,
                tuple(output[sent:]),
                reply.result() if reply.done else None,
                text if reply.reading is None else text_of(events, CONTENT),
                text_of(events, REASONING),
                call_deltas(events),
                tuple(reply.logprobs[sent : len(output)]),
            )
