"""Generation under asyncio: any number of prompts at once, each read as it is generated."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.feed import Entry, Feed, Handed, Refused
from makeready.engine.given import Sampling
from makeready.engine.llm import LLM
from makeready.engine.pieces import Piece, Samples
from makeready.engine.reply import Reply

__all__ = ["AsyncLLM", "Piece"]


@dataclass(eq=False)
class _Call:
    """A call of ``generate``: the replies that it waits for, and who reads what they come to."""

    replies: list[Reply]
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Piece | BaseException] = field(default_factory=asyncio.Queue)
    entry: Entry[_Call] | None = None  # once the feed has it

    def __post_init__(self) -> None:
        self.samples = Samples(self.replies)


class AsyncLLM:
    """An LLM whose steps run in a thread of their own, as long as there is anything to run.

    >>> async with AsyncLLM(LLM("path/to/folder_or.gguf")) as llm:
    ...     async for piece in llm.generate("Once upon a time"):
    ...         print(piece.text, end="")

    Args:
        llm: a loaded model, which nobody else uses meanwhile. It stays loaded when this is closed;
            ``with LLM(...) as llm`` around it, or ``llm.close()``, gives its memory back.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        # Who reads an answer is told at once where there is no room for it.
        self._feed = Feed[_Call](llm.engine, patient=False)
        self._calls: dict[_Call, None] = {}  # the thread's own, in order of arrival
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="makeready engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End what still runs, and the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = None,
        *,
        extra_key: str = "",
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[Piece]:
        """Yield what each step adds to the ``n`` samples of a prompt.

        Leaving the iteration, or cancelling the task that is in it, aborts what is not finished.

        Args:
            prompt: a text, or token ids.
            sampling: how to generate; None takes the model's ``default_sampling``, a dict changes fields of it.
            extra_key, priority, add_special_tokens: see :meth:`makeready.engine.llm.LLM.generate`.

        Raises:
            RequestError, TextError: the prompt cannot be served, or the engine is closed.
        """
        make = partial(
            self.llm.replies,
            prompt,
            sampling,
            extra_key=extra_key,
            priority=priority,
            add_special_tokens=add_special_tokens,
        )
        async for piece in self._served(make):
            yield piece

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling = None,
        *,
        extra_key: str = "",
        priority: int = 0,
        **template: Any,
    ) -> AsyncIterator[Piece]:
        """The same for a conversation, whose pieces tell content, reasoning and tool calls apart.

        Args:
            messages, template: as for :meth:`makeready.engine.llm.LLM.chat`, ``tools`` among them.
        """
        make = partial(
            self.llm.chat_replies, messages, sampling, extra_key=extra_key, priority=priority, **template
        )
        async for piece in self._served(make):
            yield piece

    async def _served(self, make: Callable[[], list[Reply]]) -> AsyncIterator[Piece]:
        """Run replies, and drop them when nobody reads on."""
        replies = await asyncio.to_thread(make)  # a long text takes a while to tokenize
        call, left = _Call(replies, asyncio.get_running_loop()), len(replies)
        self._ask(partial(self._put, call))
        try:
            while left:
                piece = await call.queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.output is not None
                yield piece
        finally:
            if left:
                self._ask(partial(self._drop, call), required=False)

    def _ask(self, act: Callable[[], None], required: bool = True) -> None:
        """Have the thread do something between two steps."""
        with self._wake:
            if not self._closed:
                self._inbox.append(act)
                self._wake.notify()
            elif required:
                raise RequestError("the engine is closed; make a new AsyncLLM") from self._failure

    def _run(self) -> None:
        try:
            while self._receive():
                self._deliver(self._feed.step())
        except BaseException as failure:
            self._failure = failure
        with self._wake:
            self._closed = True
        while self._inbox:
            self._last(self._inbox.popleft())
        failed = self._failure is not None
        self._last(self._feed.close)
        if not failed:
            self._deliver([])
        last = self._failure or RequestError("the engine is closed; make a new AsyncLLM")
        self._tell([(call, last) for call in self._calls])

    def _last(self, act: Callable[[], None]) -> None:
        """Do something although the thread ends; what broke before may break again."""
        try:
            act()
        except BaseException as failure:
            self._failure = self._failure or failure

    def _receive(self) -> bool:
        """Wait for something to do, and do what was asked; False once closed."""
        with self._wake:
            while not (self._closed or self._inbox or self._feed.busy):
                self._wake.wait()
            if self._closed:
                return False
        while self._inbox:  # one that fails leaves the others, for whoever has to tell their readers
            self._inbox.popleft()()
        return True

    def _put(self, call: _Call) -> None:
        self._calls[call] = (
            None  # first, so that whoever waits for the call is told of an error in the next line
        )
        call.entry = self._feed.put(call, lambda: call.replies)

    def _drop(self, call: _Call) -> None:
        if call in self._calls:
            del self._calls[call]
            if call.entry is not None:
                self._feed.drop(call.entry)

    def _deliver(self, handed: list[Handed[_Call]]) -> None:
        """Hand every reader what is new."""
        refused = [(each.key, each.error) for each in handed if isinstance(each, Refused)]
        for call, _ in refused:
            self._calls.pop(call, None)
        pieces = [(call, piece) for call in self._calls for piece in call.samples.pieces()]
        for call, piece in pieces:
            if piece.output is not None and not call.samples.left:
                self._calls.pop(call, None)
        self._tell([*refused, *pieces])

    def _tell(self, items: list[tuple[_Call, Any]]) -> None:
        """Into the readers' queues, with one call to each loop: a call wakes its thread."""
        for loop in {call.loop for call, _ in items}:
            mine = [(call.queue, item) for call, item in items if call.loop is loop]
            with suppress(RuntimeError):  # the loop is closed, and nobody reads any more
                loop.call_soon_threadsafe(_put_all, mine)


def _put_all(items: Sequence[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)
