"""Generation under asyncio: any number of prompts at once, each read as it is generated."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.given import Sampling
from makeready.engine.llm import LLM
from makeready.engine.request import Output, Request


@dataclass(frozen=True)
class Piece:
    """What a step added to a sample.

    Attributes:
        index: which of the prompt's samples.
        text: that became final; empty while a stop string may be about to end it.
        token_ids: new ones.
        output: the whole, with the sample's last piece.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    output: Output | None = None


@dataclass
class _Stream:
    """A sample and who reads it."""

    index: int
    request: Request
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Piece | BaseException]
    texts: list[str] = field(default_factory=list)
    sent: int = 0

    def piece(self) -> Piece | None:
        """What is new, if anything."""
        request = self.request
        if not request.done and not self.texts and len(request.output) == self.sent:
            return None
        text, self.texts[:] = "".join(self.texts), ()
        tokens, self.sent = tuple(request.output[self.sent :]), len(request.output)
        return Piece(self.index, text, tokens, request.result() if request.done else None)


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
        self._engine = llm.engine
        self._streams: dict[Request, _Stream] = {}  # the thread's own
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
            self.llm.requests,
            prompt,
            sampling,
            extra_key=extra_key,
            priority=priority,
            add_special_tokens=add_special_tokens,
        )
        requests = await asyncio.to_thread(make)  # a long text takes a while to tokenize
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        streams = [_Stream(i, request, loop, queue) for i, request in enumerate(requests)]
        self._ask(partial(self._submit, streams))
        left = len(streams)
        try:
            while left:
                piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.output is not None
                yield piece
        finally:
            if left:
                self._ask(partial(self._abort, streams), required=False)

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
                self._engine.step()
                self._deliver()
        except BaseException as failure:
            self._failure = failure
        with self._wake:
            self._closed = True
        while self._inbox:
            self._last(self._inbox.popleft())
        streams = list(self._streams.values())
        if self._failure is not None:
            self._put([(stream, self._failure) for stream in streams])
        for stream in streams:
            self._last(partial(self._engine.abort, stream.request))
        self._deliver()

    def _last(self, act: Callable[[], None]) -> None:
        """Do something although the thread ends; what broke before may break again."""
        try:
            act()
        except BaseException as failure:
            self._failure = self._failure or failure

    def _receive(self) -> bool:
        """Wait for something to do, and do what was asked; False once closed."""
        with self._wake:
            while not (self._closed or self._inbox or self._engine.busy):
                self._wake.wait()
            if self._closed:
                return False
        while self._inbox:  # one that fails leaves the others, for whoever has to tell their readers
            self._inbox.popleft()()
        return True

    def _submit(self, streams: Sequence[_Stream]) -> None:
        # Known before anything can go wrong: whoever reads one of them is told of it.
        self._streams |= {stream.request: stream for stream in streams}
        for stream in streams:
            stream.request.on_text = stream.texts.append
            try:
                self._engine.submit(stream.request)
            except RequestError as error:
                self._abort(streams)
                self._put([(stream, error)])
                return

    def _abort(self, streams: Sequence[_Stream]) -> None:
        for stream in streams:
            if self._streams.pop(stream.request, None) is not None:
                self._engine.abort(stream.request)

    def _deliver(self) -> None:
        """Hand every reader what is new."""
        pieces = [
            (stream, piece) for stream in self._streams.values() if (piece := stream.piece()) is not None
        ]
        for stream, piece in pieces:
            if piece.output is not None:
                del self._streams[stream.request]
        self._put(pieces)

    def _put(self, items: Sequence[tuple[_Stream, Any]]) -> None:
        """Into the readers' queues, with one call to each loop: a call wakes its thread."""
        for loop in {stream.loop for stream, _ in items}:
            mine = [(stream.queue, item) for stream, item in items if stream.loop is loop]
            with suppress(RuntimeError):  # the loop is closed, and nobody reads any more
                loop.call_soon_threadsafe(_put_all, mine)


def _put_all(items: Sequence[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, item in items:
        queue.put_nowait(item)
