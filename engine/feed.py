"""Prompts on their way through the engine: the one path of ``LLM``, ``AsyncLLM`` and batch jobs.

    make     the replies to a prompt; long texts are tokenized, and grammars compiled, in threads, while steps run
    queue    these, as the engine has room
    step     the engine
    hand     back each reply when it is final, or what refused its prompt

No input is held as a whole: ``room`` says how much of it should be there before the next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from makeready.engine.errors import reason_of
from makeready.engine.given import Conversation, has_grammar, is_long, samples_of
from makeready.engine.loop import Engine
from makeready.engine.output import Output
from makeready.engine.reply import Reply

# Replies that wait beside those that run: the scheduler chooses among so many, for shared prefixes and a full batch.
AHEAD = 1024
# Of these, so many are made a step: a device that is running shall not wait for text to be tokenized.
MADE = 16
# Grammars that are compiled at once; a large one takes seconds.
COMPILERS = 2
# Between two looks at long texts, where nothing runs.
IDLE_SECONDS = 0.1

Key = TypeVar("Key")
Given: TypeAlias = "tuple[Any, ...]"  # a prompt, its sampling parameters, and what else makes its replies


@dataclass(eq=False)
class Entry(Generic[Key]):
    """A prompt on its way; ``replies`` are there once they were made, one a sample."""

    key: Key
    samples: int
    replies: list[Reply] = field(default_factory=list)
    dropped: bool = False


@dataclass(frozen=True)
class Final(Generic[Key]):
    """The reply to a prompt's sample of this number is final."""

    key: Key
    sample: int
    reply: Reply


@dataclass(frozen=True)
class Refused(Generic[Key]):
    """A prompt that is not served, and why; none of its samples runs."""

    key: Key
    error: BaseException


Handed: TypeAlias = "Final[Key] | Refused[Key]"


class Feed(Generic[Key]):
    """Takes prompts, runs the engine, hands replies back. Prompts are told apart by the keys of who gives them.

    Args:
        engine: what runs them; others may use it as well.
        patient: let replies wait until the engine's queue has room; else they are refused where it has none.
    """

    def __init__(self, engine: Engine, *, patient: bool = True) -> None:
        self._engine, self._patient = engine, patient
        if patient:  # nobody waits for one answer more than for another
            engine.scheduler.waiting.batch(True)
        # One thread: texts that are long enough for it take memory, 300 bytes a byte of text.
        self._reader = ThreadPoolExecutor(1, "makeready reader")
        self._compiler = ThreadPoolExecutor(COMPILERS, "makeready grammars")
        self._reading: dict[Future[list[Reply]], Entry[Key]] = {}
        self._ready: deque[tuple[Entry[Key], int]] = deque()
        self._running: dict[Reply, tuple[Entry[Key], int]] = {}  # in the engine, waiting or running
        self._handed: list[Handed[Key]] = []

    @property
    def busy(self) -> bool:
        """Whether anything is not handed back."""
        return bool(self._running or self._ready or self._reading or self._handed)

    @property
    def depth(self) -> int:
        """Replies that it takes before any is final."""
        return self._engine.limits.max_rows + AHEAD

    @property
    def room(self) -> int:
        """Replies that it should be asked for before the next step."""
        rows, unqueued = self._engine.limits.max_rows, len(self._ready) + self._samples_read
        taken = len(self._running) + unqueued
        return max(0, min(max(rows - taken, min(MADE, self.depth - taken)), self._engine.room - unqueued))

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far for replies that are not final."""
        return sum(len(reply.sequence.output) for reply in self._running)

    @property
    def _samples_read(self) -> int:
        return sum(entry.samples for entry in self._reading.values())

    def put(
        self,
        key: Key,
        make: Callable[[], list[Reply]],
        *,
        samples: int = 1,
        long: bool = False,
        grammar: bool = False,
    ) -> Entry[Key]:
        """Take a prompt.

        Args:
            make: its replies, made now, or in a thread if it is ``long`` or has a ``grammar``. What it raises
                refuses the prompt.
            samples: how many these will be.
        """
        entry = Entry(key, samples)
        if grammar or long:
            self._reading[(self._compiler if grammar else self._reader).submit(make)] = entry
        else:
            self._take(entry, make)
        self._queue()
        return entry

    def step(self) -> list[Handed[Key]]:
        """Run one step of the engine; returns what is there to hand back by now."""
        for future in [future for future in self._reading if future.done()]:
            entry = self._reading.pop(future)
            if not entry.dropped:
                self._take(entry, future.result)
        self._queue()
        if self._reading and not (self._running or self._ready or self._handed):
            wait(self._reading, IDLE_SECONDS, FIRST_COMPLETED)
        else:
            self._engine.step()
        handed, self._handed = self._handed, []
        return handed

    def drop(self, entry: Entry[Key]) -> None:
        """End a prompt wherever it is; nothing more is handed back of it."""
        entry.dropped = True
        for reply in entry.replies:
            if self._running.pop(reply, None) is not None:
                self._engine.abort(reply.sequence)

    def close(self) -> None:
        """End all that is under way."""
        if self._patient:
            self._engine.scheduler.waiting.batch(False)
        for future in self._reading:
            future.cancel()
        self._reader.shutdown(wait=False)
        self._compiler.shutdown(wait=False)
        for entry in {entry: None for entry, _ in self._running.values()}:
            self.drop(entry)
        for left in (self._reading, self._ready, self._handed):
            left.clear()

    def _take(self, entry: Entry[Key], make: Callable[[], list[Reply]]) -> None:
        """The replies that ``make`` gives are ready."""
        try:
            entry.replies = make()
        except BaseException as error:
            self._handed.append(Refused(entry.key, error))
        self._ready.extend((entry, sample) for sample in range(len(entry.replies)))

    def _queue(self) -> None:
        """Give the engine what is ready, as far as there is room."""
        while self._ready and (self._engine.room or not self._patient):
            entry, sample = self._ready.popleft()
            if entry.dropped:
                continue
            reply = entry.replies[sample]
            reply.on_finish = self._finish
            self._running[reply] = entry, sample
            try:
                self._engine.submit(reply.sequence, reply)
            except BaseException as error:
                del self._running[reply]
                self.drop(entry)
                self._handed.append(Refused(entry.key, error))

    def _finish(self, reply: Reply) -> None:
        found = self._running.pop(reply, None)
        if found is not None:
            entry, sample = found
            self._handed.append(Final(entry.key, sample, reply))


def outputs_of(
    engine: Engine, prompts: Iterator[Given], make: Callable[..., list[Reply]]
) -> Generator[tuple[int, Output], None, None]:
    """Run prompts as there is room for them; yields the place of each sample among all, and its output.

    Args:
        prompts: each with its sampling parameters and whatever else ``make`` takes.
        make: the replies to a prompt; what it raises is the output of all of its samples.
    """
    more, end = True, 0
    with closing(Feed[range](engine)) as feed:
        while more or feed.busy:
            room = feed.room
            while room > 0 and (given := next(prompts, None)) is not None:
                prompt, sampling = given[:2]
                places = range(end, end + samples_of(sampling))
                feed.put(
                    places,
                    partial(make, *given),
                    samples=len(places),
                    long=is_long(prompt),
                    grammar=has_grammar(
                        sampling, prompt.template if isinstance(prompt, Conversation) else None
                    ),
                )
                end, room = places.stop, room - len(places)
            more = room <= 0  # else there was no further prompt
            for handed in feed.step():
                places = handed.key
                if isinstance(handed, Refused):
                    reason = reason_of(handed.error, "the prompt cannot be read")
                    yield from ((place, Output.refused(reason)) for place in places)
                else:
                    yield places[handed.sample], handed.reply.result()
