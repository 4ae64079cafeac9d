"""The engine's side: a process that loads a model, takes requests in and sends tokens out, a message a step.

It knows no text and no protocol. It imports no HTTP, and torch only where a plan is compiled or runs on the CPU.
Its loop is one thread: receive, step, send; nothing in it waits while sequences run.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from makeready.engine.errors import BusyError, RequestError, reason_of
from makeready.engine.feed import Entry, Feed, Final, Refused
from makeready.engine.front import Constrain
from makeready.engine.loop import Engine
from makeready.engine.output import TokenLogprob
from makeready.engine.remote.channel import Channel, ClosedError
from makeready.engine.remote.messages import (
    Abort,
    End,
    Failed,
    Flush,
    Flushed,
    Load,
    Loaded,
    Logprob,
    Note,
    Ran,
    Refusal,
    Step,
    Submit,
    ToHost,
    Update,
    Watch,
)
from makeready.engine.remote.pace import Pace
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ABORT, TokenSequence
from makeready.engine.step_record import StepRecord

if TYPE_CHECKING:
    from makeready.engine.llm import LLM

BEAT_SECONDS = 1.0  # between two signs of life where nothing runs
SENT_SECONDS = 1.0  # for the other side to take what is said last


@dataclass(eq=False, slots=True)
class Relay(Reply):
    """The reply of a sequence whose text is made elsewhere: its tokens are sent on as they come.

    Attributes:
        key, index: request and sample.
        news: where it puts itself when there is something to tell.
    """

    key: int = 0
    index: int = 0
    news: dict[Relay, None] | None = None
    _sent: int = 0
    _told_input: bool = False

    @property
    def follows(self) -> bool:
        return True

    def read(self) -> int:
        if len(self.sequence.output) > self._sent and self.news is not None:
            self.news[self] = None
        return 0

    def update(self) -> Update:
        """What was not told yet."""
        sequence, sent = self.sequence, self._sent
        self._sent = count = len(sequence.output)
        told: list[TokenLogprob] = []
        if sequence.sampling.return_logprob and not self._told_input and (self.done or count):
            told, self._told_input = self.input_logprobs, True
        return Update(
            self.key,
            self.index,
            sequence.output[sent:],
            [*map(_plain, self.logprobs[sent:count])],
            [*map(_plain, told)],
            self._end() if self.done else None,
        )

    def _end(self) -> End:
        sequence = self.sequence
        constraint = sequence.constraint
        return End(
            sequence.finish_reason or ABORT,
            self.error,
            constraint is not None and constraint.error is not None,
            sequence.cached_tokens,
            sequence.retractions,
            (self.admitted or self.finished) - self.arrived,
            (sequence.verify_steps, sequence.drafted, sequence.accepted),
        )


def _plain(logprob: TokenLogprob) -> Logprob:
    return logprob.token_id, logprob.logprob, list(logprob.top)


class Host:
    """Serves an engine to the other side of a channel.

    Args:
        engine: what runs requests; nobody else uses it.
        constrain: compiles grammars; None where there is no tokenizer.
        channel: to the other side, which has been told that the model is loaded.
    """

    def __init__(self, engine: Engine, constrain: Constrain | None, channel: Channel[ToHost]) -> None:
        self._engine, self._constrain, self._channel = engine, constrain, channel
        self._feed = Feed[int](engine, patient=False)
        self._entries: dict[int, Entry[int]] = {}
        self._unconfirmed: dict[int, Entry[int]] = {}
        self._news: dict[Relay, None] = {}
        self._refused: list[Refusal] = []
        self._records: list[StepRecord] = []
        self._chunks: list[Ran] = []
        self._turned_away = 0  # samples, since there was room the last time
        self._pace = Pace()
        self._sent = self._read = 0.0
        engine.observer = self._observe

    def run(self) -> None:
        """Receive, step, send, until the other side has gone; raises what breaks the engine."""
        try:
            while True:
                self._receive(0.0 if self._feed.busy else BEAT_SECONDS)
                if self._feed.busy:
                    self._step()
                self._send()
        except ClosedError:
            return
        finally:
            self._feed.close()

    def _receive(self, seconds: float) -> None:
        for message in self._channel.receive(seconds):
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Abort):
                self._abort(message)
            elif isinstance(message, Flush):
                self._channel.send(Flushed(self._engine.forget()))
            elif isinstance(message, Watch):
                self._engine.on_chunk = self._ran if message.on else None

    def _submit(self, message: Submit) -> None:
        self._unconfirmed[message.key] = self._entries[message.key] = self._feed.put(
            message.key,
            partial(self._made, message),
            samples=len(message.seeds),
            grammar=message.grammar is not None,
        )

    def _made(self, message: Submit) -> list[Reply]:
        """The replies to a request; in a thread where a grammar has to be compiled."""
        sampling, ends = SamplingParams(**message.sampling), frozenset(message.end_ids)
        constraint = None
        if message.grammar is not None:
            if self._constrain is None:
                raise RequestError("an output that follows a grammar needs a tokenizer, and there is none")
            constraint = self._constrain(*message.grammar)
        each = len(message.seeds) // len(message.prompts)
        return [
            Relay(
                TokenSequence(
                    message.prompts[index // each],
                    sampling,
                    seed,
                    ends,
                    message.extra_key,
                    message.priority,
                    None if constraint is None else constraint.copy(),
                ),
                key=message.key,
                index=index,
                news=self._news,
            )
            for index, seed in enumerate(message.seeds)
        ]

    def _abort(self, message: Abort) -> None:
        entry = self._entries.get(message.key)
        if entry is None:
            return
        if message.sample is not None and message.sample < len(entry.replies):
            self._engine.abort(entry.replies[message.sample].sequence)
            return
        self._forget(message.key)
        self._feed.drop(entry)
        for reply in entry.replies:
            self._news.pop(reply, None)  # type: ignore[arg-type]

    def _forget(self, key: int) -> None:
        self._entries.pop(key, None)
        self._unconfirmed.pop(key, None)

    def _step(self) -> None:
        for handed in self._feed.step():
            if isinstance(handed, Refused):
                entry = self._entries.get(handed.key)
                self._forget(handed.key)
                self._refused.append(self._refusal(handed, 1 if entry is None else entry.samples))
            elif isinstance(handed, Final) and isinstance(handed.reply, Relay):
                self._news[handed.reply] = None
                self._pace.ended(handed.reply.sequence)
                entry = self._entries.get(handed.key)
                if entry is not None and all(reply.done for reply in entry.replies):
                    self._forget(handed.key)

    def _refusal(self, handed: Refused[int], samples: int) -> Refusal:
        reason = reason_of(handed.error, "the request cannot be run")
        retry: float | None = None
        if isinstance(handed.error, BusyError):
            # Those that were turned away before this one come again, too.
            self._turned_away += samples
            retry = self._pace.seconds_until(self._turned_away, self._engine.scheduler.running)
        foreseen = isinstance(handed.error, ValueError)
        return Refusal(handed.key, reason, retry, foreseen)

    def _ran(self, reply: Reply, start: int, tokens: int) -> None:
        if isinstance(reply, Relay):
            self._chunks.append(Ran(len(self._records), reply.key, reply.index, start, tokens))

    def _observe(self, record: StepRecord) -> None:
        self._pace.step(record.results_read - max(self._read, record.plan_start))
        self._read = record.results_read
        self._records.append(record)

    def _send(self) -> None:
        """Tell what is new, or that this process is alive."""
        accepted = [key for key, entry in self._unconfirmed.items() if entry.replies]
        for key in accepted:
            del self._unconfirmed[key]
        if self._turned_away and self._engine.room:
            self._turned_away = 0
        now = time.monotonic()
        told = self._news or accepted or self._refused or self._records
        if not told and now - self._sent < BEAT_SECONDS:
            return
        self._sent = now
        scheduler, pool = self._engine.scheduler, self._engine.pool
        updates = [relay.update() for relay in self._news]
        self._channel.send(
            Step(
                updates,
                accepted,
                self._refused,
                self._records,
                len(scheduler.waiting),
                len(scheduler.running),
                (pool.free, pool.cached, pool.held),
                self._chunks,
            )
        )
        self._news.clear()
        self._refused, self._records, self._chunks = [], [], []


def load(message: Load, note: Callable[[str, str], None]) -> LLM:
    """The model that a message asks for.

    Raises:
        ValueError: a class of ours, with a sentence that says what is wrong.
    """
    from makeready.engine.llm import LLM
    from makeready.graphs.checkpoint.base import open_checkpoint
    from makeready.graphs.plan.buckets import Traffic

    options: dict[str, Any] = {}
    note("stage", "read the checkpoint")
    checkpoint = message.beside.open(open_checkpoint(message.checkpoint, config=message.model))
    if message.plan is None:
        passes = tuple(message.request["disabled_passes"])
        traffic = Traffic(**message.request["traffic"])
        options = {**message.request, "disabled_passes": passes, "traffic": traffic}
        note("stage", "find or compile a plan")

    def report(sentence: str) -> None:
        note("stage", "load the model")
        note("report", sentence)

    return LLM(
        checkpoint,
        None if message.plan is None else Path(message.plan),
        kv_memory_gib=message.kv_memory_gib,
        scheduler=message.scheduler,
        generation_config=False,  # the other side's, with all else that becomes of a request
        report=report,
        progress=lambda done, total: note("detail", f"{done} of {total} weights"),
        **options,
    )


def loaded(llm: LLM) -> Loaded:
    """What the other side has to know of a model."""
    plan, engine = llm.plan, llm.engine
    facts = {
        "target": plan.target,
        "device": plan.device,
        "kv_pages": engine.pool.usable,
        "prefix_cache": engine.options.prefix_cache,
        "deterministic": engine.options.deterministic,
        "architecture": (llm.checkpoint.config.get("architectures") or [None])[0],
        "vocab_size": plan.config["vocab_size"],
    }
    return Loaded(plan.limits, plan.config["vocab_size"], list(plan.steps), plan.digest, facts)


def main() -> int:
    """Serve the socket that is this process's stdin; returns the exit code."""
    # Whoever started this process is told to end, and ends it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=os.dup(0))
    os.dup2(2, 1)
    channel = Channel[ToHost](sock, ToHost)
    try:
        messages: list[ToHost] = []
        while not messages:
            messages = channel.receive(BEAT_SECONDS)
        (first,) = messages
        assert isinstance(first, Load)
        with load(first, lambda kind, text: channel.send(Note(kind, text))) as llm:
            channel.send(loaded(llm))
            Host(llm.engine, llm.front.constrain, channel).run()
    except ClosedError:
        return 0
    except BaseException as error:
        foreseen = isinstance(error, ValueError) and type(error).__module__.startswith("makeready.")
        said = str(error) if foreseen else f"{type(error).__name__}: {error}"
        channel.send(Failed(said, foreseen))
        channel.drain(SENT_SECONDS)
        if not foreseen:
            raise
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
