"""The side of text, under asyncio: starts an engine's process, and makes answers of the tokens that it sends."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, cast

from makeready.engine.errors import BusyError, RequestError
from makeready.engine.output import TokenLogprob
from makeready.engine.pieces import Piece, Samples
from makeready.engine.remote.channel import Framer, framed
from makeready.engine.remote.messages import (
    Abort,
    End,
    Failed,
    Flush,
    Flushed,
    FromHost,
    Load,
    Loaded,
    Logprob,
    Note,
    Refusal,
    Step,
    Submit,
    ToHost,
    Update,
    Watch,
)
from makeready.engine.reply import Reply
from makeready.engine.sampling import GRAMMARS, SamplingParams
from makeready.engine.sequence import ABORT
from makeready.engine.step_record import StepRecord
from makeready.graphs.children import start

HOST = "makeready.engine.remote.host"
END_SECONDS = 5.0  # for a process to end by itself
# Fields that only text knows; grammars travel by themselves, for they may be a call's that is forced.
OF_TEXT = frozenset(
    {"stop", "stop_regex", "no_stop_trim", "skip_special_tokens", "n", "sampling_seed", *GRAMMARS}
)


class EngineGoneError(RuntimeError):
    """The engine's process has ended; nothing runs any more."""


class LoadError(ValueError):
    """The model cannot be loaded; a sentence that says why."""


class UnavailableError(BusyError):
    """There is no room now.

    Attributes:
        retry_seconds: after which there may be.
    """

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class Call:
    """A request under way: its answer, as far as it is known, and who waits for more of it.

    Attributes:
        replies: one a sample; their sequences follow what the engine tells.
        faults: samples that failed, and not by a fault of their request.
        outcome: done once the engine has taken the request in, or an exception that says why not.
    """

    def __init__(self, replies: Sequence[Reply], loop: asyncio.AbstractEventLoop) -> None:
        self.replies = replies
        self.outcome: asyncio.Future[None] = loop.create_future()
        self.faults: set[int] = set()
        self._samples = Samples(replies)
        self._news = asyncio.Event()
        self._failure: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return all(reply.done for reply in self.replies)

    async def accepted(self) -> None:
        """Wait until the engine has the request in its queue.

        Raises:
            RequestError: it cannot be served.
            UnavailableError: there is no room now.
            EngineGoneError: there is no engine any more.
        """
        await asyncio.shield(self.outcome)

    async def pieces(self, seconds: float = math.inf) -> AsyncIterator[list[Piece]]:
        """What becomes known of the samples, as it does; what came while nobody asked comes as one.

        Args:
            seconds: after so many without news an empty list comes.

        Raises:
            EngineGoneError: there is no engine any more.
        """
        while self._samples.left:
            if not self._news.is_set():
                await self._wait(seconds)
            self._news.clear()
            if self._failure is not None:
                raise self._failure
            yield list(self._samples.pieces())

    async def _wait(self, seconds: float) -> None:
        if seconds == math.inf:
            await self._news.wait()
            return
        timer = asyncio.get_running_loop().call_later(seconds, self._news.set)
        try:
            await self._news.wait()
        finally:
            timer.cancel()

    def take(self, update: Update) -> bool:
        """Take in what is new of a sample; returns whether its text ended before the engine knew."""
        self.accept()  # one that ends in its first step is told of once
        reply = self.replies[update.sample]
        if reply.done:
            return False
        sequence, prompt = reply.sequence, len(reply.sequence.prompt)
        for logprob in update.input_logprobs:
            if logprob[1] is not None:  # the first of all, which has none, is known
                reply.report(0, _logprob(logprob))
        for logprob in update.logprobs:
            reply.report(prompt, _logprob(logprob))
        for token in update.tokens:
            sequence.append(token)
        if update.tokens:
            reply.first_token = reply.first_token or time.perf_counter()
        told = self._ended_by(reply, update.end)
        if update.end is not None and update.end.error is not None and not update.end.own:
            self.faults.add(update.sample)
        reply.read()  # which may end it earlier
        if sequence.done:
            reply.finish()
        self._news.set()
        return sequence.done and not told

    def _ended_by(self, reply: Reply, end: End | None) -> bool:
        if end is None:
            return False
        sequence = reply.sequence
        reply.admitted = reply.arrived + end.queue_seconds
        sequence.cached_tokens, sequence.retractions = end.cached_tokens, end.retractions
        sequence.verify_steps, sequence.drafted, sequence.accepted = end.drafts
        sequence.finish(end.reason)
        reply.error = end.error
        return True

    def accept(self) -> None:
        """The engine has it."""
        if not self.outcome.done():
            self.outcome.set_result(None)

    def refuse(self, refusal: Refusal) -> None:
        """The engine does not run it."""
        if refusal.retry_seconds is not None:
            self.fail(UnavailableError(refusal.reason, refusal.retry_seconds))
        else:
            self.fail(RequestError(refusal.reason) if refusal.foreseen else RuntimeError(refusal.reason))

    def fail(self, error: BaseException) -> None:
        """Nothing more is to come."""
        self._failure = error
        self._news.set()
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # it is raised by whoever waits; nobody may


def _logprob(given: Logprob) -> TokenLogprob:
    token, value, top = given
    return TokenLogprob(token, value, tuple((token, value) for token, value in top))


class EngineClient(asyncio.Protocol):
    """The engine in its own process, as this one sees it.

    Both end together: a host whose starter is gone is killed by the system, and :attr:`gone` tells of a host that is.

    Attributes:
        loaded: what the host said of its model; None before.
        gone: done when the host has ended, with its reason.
        beat: ``time.monotonic`` of its last sign of life.
        waiting, running: sequences at that time.
        pages: free, cached and held at that time.
        last: record of its last step; None before the first.
        observer: told of every step.
        on_chunk: while :meth:`watch` is on, told of every chunk of a prompt that was run: its first token, how many,
            and from when to when, as ``time.perf_counter`` of this process.
    """

    def __init__(self, note: Callable[[str, str], None]) -> None:
        loop = asyncio.get_running_loop()
        self.loaded: Loaded | None = None
        self.gone: asyncio.Future[str] = loop.create_future()
        self.beat = time.monotonic()
        self.waiting = self.running = 0
        self.pages = 0, 0, 0
        self.last: StepRecord | None = None
        self.observer: Callable[[StepRecord], None] = lambda record: None
        self.on_chunk: Callable[[Reply, int, int, float, float], None] = lambda *chunk: None
        self._loop, self._note = loop, note
        self._ready: asyncio.Future[Loaded] = loop.create_future()
        self._framer = Framer[FromHost](FromHost)
        self._calls: dict[int, Call] = {}
        self._keys = itertools.count()
        self._flushes: list[asyncio.Future[int]] = []
        self._transport: asyncio.WriteTransport | None = None
        self._process: subprocess.Popen[Any] | None = None

    @classmethod
    async def start(cls, message: Load, note: Callable[[str, str], None]) -> EngineClient:
        """Start the process and load a model in it.

        Args:
            note: told of how far that is; kind and text of a :class:`~makeready.engine.remote.messages.Note`.

        Raises:
            LoadError: it cannot be loaded.
            EngineGoneError: the process has ended.
        """
        client = cls(note)
        ours, theirs = socket.socketpair()
        with theirs:
            client._process = start([sys.executable, "-m", HOST], stdin=theirs)
        await client.connect(ours, message)
        return client

    async def connect(self, sock: socket.socket, message: Load) -> Loaded:
        """Speak to the host behind a socket, and have it load a model."""
        sock.setblocking(False)
        await self._loop.create_unix_connection(lambda: self, sock=sock)
        self._send(message)
        self.loaded = await self._ready
        return self.loaded

    def submit(self, replies: Sequence[Reply]) -> tuple[int, Call]:
        """Have replies that were made for this plan filled; returns what names the request, and its course.

        Raises:
            EngineGoneError: there is no engine any more.
        """
        if self.gone.done():
            raise EngineGoneError(self.gone.result())
        key, call, first = next(self._keys), Call(replies, self._loop), replies[0]
        sequence = first.sequence
        prompts = [reply.sequence.prompt for reply in replies[:: sequence.sampling.n]]
        self._calls[key] = call
        self._send(
            Submit(
                key,
                prompts,
                [reply.sequence.seed for reply in replies],
                _asked(sequence.sampling),
                sorted(sequence.end_ids),
                sequence.salt,
                sequence.priority,
                first.grammar,
            )
        )
        return key, call

    def drop(self, key: int) -> None:
        """End a request of which nobody wants to know any more; nothing if it is done."""
        if self._calls.pop(key, None) is not None:
            self._send(Abort(key))

    def abort(self, key: int) -> None:
        """End a request whose answer is wanted as far as it is."""
        call = self._calls.pop(key, None)
        if call is None:
            return
        self._send(Abort(key))
        for index, reply in enumerate(call.replies):
            sequence = reply.sequence
            end = End(ABORT, None, False, sequence.cached_tokens, sequence.retractions, 0.0, (0, 0, 0))
            call.take(Update(key, index, [], [], [], end))

    async def flush(self) -> int:
        """Forget cached prefixes that nobody holds; returns how many pages that were."""
        if self.gone.done():
            raise EngineGoneError(self.gone.result())
        answer: asyncio.Future[int] = self._loop.create_future()
        self._flushes.append(answer)
        self._send(Flush())
        return await answer

    def watch(self, on: bool) -> None:
        """Have the engine tell of chunks, or no longer."""
        self._send(Watch(on))

    async def close(self) -> None:
        """End the host, and what still runs with it."""
        if self._transport is not None:
            self._transport.close()
        process = self._process
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, END_SECONDS)
            process.kill()
            await asyncio.to_thread(process.wait)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self.beat = time.monotonic()
        for message in self._framer.feed(data):
            if isinstance(message, Step):
                self._take(message)
            elif isinstance(message, Note):
                self._note(message.kind, message.text)
            elif isinstance(message, Loaded):
                self._ready.set_result(message)
            elif isinstance(message, Flushed):
                self._flushes.pop(0).set_result(message.pages)
            elif isinstance(message, Failed):
                self._end(message.reason, message.foreseen)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the engine's process has ended", foreseen=False)

    def _take(self, step: Step) -> None:
        self.waiting, self.running, self.pages = step.waiting, step.running, step.pages
        for key in step.accepted:
            if key in self._calls:
                self._calls[key].accept()
        for refusal in step.refused:
            call = self._calls.pop(refusal.key, None)
            if call is not None:
                call.refuse(refusal)
        for ran in step.chunks:
            call, record = self._calls.get(ran.key), step.records[ran.record]
            if call is not None:
                since = (
                    time.perf_counter() - step.records[-1].commit_end
                )  # clocks of processes need not agree
                reply, end = call.replies[ran.sample], record.results_read + since
                self.on_chunk(reply, ran.start, ran.tokens, record.launch_start + since, end)
        for update in step.updates:
            call = self._calls.get(update.key)
            if call is None:
                continue
            early = call.take(update)
            if call.done:
                del self._calls[update.key]
            if early:
                self._send(Abort(update.key, None if call.done else update.sample))
        for record in step.records:
            self.last = record
            self.observer(record)

    def _end(self, reason: str, foreseen: bool) -> None:
        if self.gone.done():
            return
        self.gone.set_result(reason)
        error = EngineGoneError(reason)
        if not self._ready.done():
            self._ready.set_exception(LoadError(reason) if foreseen else error)
        for call in self._calls.values():
            call.fail(error)
        self._calls.clear()
        for answer in self._flushes:
            if not answer.done():
                answer.set_exception(error)

    def _send(self, message: ToHost) -> None:
        if self._transport is not None and not self.gone.done():
            self._transport.write(framed(message))


def _asked(sampling: SamplingParams) -> dict[str, Any]:
    """Fields that matter to tokens, where they are not as by default."""
    names = (field.name for field in dataclasses.fields(SamplingParams) if field.name not in OF_TEXT)
    asked = ((name, getattr(sampling, name)) for name in names)
    return {name: value for name, value in asked if value != getattr(_PLAIN, name)}


_PLAIN = SamplingParams()
