"""Prompts of a call to the engine, as there is room for them; long ones are tokenized while steps run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from makeready.engine.errors import RequestError, reason_of
from makeready.engine.given import is_long, samples_of
from makeready.engine.loop import Engine
from makeready.engine.request import Output, Request

Asked = tuple[Any, Any, Any, Any, Any]  # prompt, sampling, extra_key, priority, add_special_tokens

# Requests that ``generate`` lets wait beside those that run: enough to choose from, and the device need not
# wait until thousands of texts are tokenized.
AHEAD = 1024
# Of these, so many are made a step.
MADE = 32


@dataclass
class _Running:
    """What a call of ``generate`` has under way.

    Attributes:
        places: of requests that are queued or run, in the list that is returned.
        reading: places of prompts that are being tokenized.
        ready: requests that the engine's queue has no room for yet, the rest of a prompt's samples, by place.
        next: place of the next prompt.
    """

    places: dict[Request, int] = field(default_factory=dict)
    reading: dict[Future[list[Request]], range] = field(default_factory=dict)
    ready: deque[tuple[int, Request]] = field(default_factory=deque)
    next: int = 0

    @property
    def samples(self) -> int:
        """Requests that are yet to come of what is being tokenized."""
        return sum(map(len, self.reading.values()))


class Feed:
    """Runs the prompts of one call, however many there are.

    Args:
        engine: what runs them.
        make: the requests of a prompt; what it raises is that prompt's own error.
    """

    def __init__(self, engine: Engine, make: Callable[[Any, Any, Any, Any, Any], list[Request]]) -> None:
        self._engine, self._make = engine, make
        # One thread: texts that are long enough for it take memory, 300 bytes a byte of text.
        self._reader = ThreadPoolExecutor(1, "makeready reader")

    def run(self, asked: Iterator[Asked]) -> Generator[tuple[int, Output], None, None]:
        """Run prompts as there is room for them; yields places and outputs as they are final."""
        running = _Running()
        try:
            while True:
                yield from self._feed(asked, running)
                if not (running.places or running.reading or running.ready) and self._engine.room:
                    return
                if not (running.places or running.ready) and running.reading:
                    wait(running.reading, return_when=FIRST_COMPLETED)
                    continue
                for request in self._engine.step():
                    if request in running.places:
                        yield running.places.pop(request), request.result()
        finally:
            for future in running.reading:
                future.cancel()
            self._reader.shutdown(wait=False)
            for request in running.places:
                self._engine.abort(request)

    def _feed(self, asked: Iterator[Asked], running: _Running) -> Iterator[tuple[int, Output]]:
        """Queue further requests; yields those that are refused."""
        for future in [future for future in running.reading if future.done()]:
            yield from self._take(running.reading.pop(future), future.result, running)
        rows, fed = self._engine.limits.max_rows, 0
        while True:
            yield from self._submit(running)
            if running.ready or self._engine.room <= running.samples:
                return
            known = len(running.places) + running.samples
            if known >= rows and (fed >= MADE or known >= rows + AHEAD):
                return
            item = next(asked, None)
            if item is None:
                return
            places = range(running.next, running.next + samples_of(item[1]))
            running.next, fed = places.stop, fed + len(places)
            make = partial(self._make, *item)
            if is_long(item[0]):
                running.reading[self._reader.submit(make)] = places
            else:
                yield from self._take(places, make, running)

    def _take(
        self, places: range, make: Callable[[], list[Request]], running: _Running
    ) -> Iterator[tuple[int, Output]]:
        """The requests that ``make`` gives are ready; where it refuses, yields the outputs that say why."""
        try:
            running.ready.extend(list(zip(places, make(), strict=True)))
        except BaseException as error:
            reason = reason_of(error, "the prompt cannot be read")
            yield from ((place, Output.refused(reason)) for place in places)

    def _submit(self, running: _Running) -> Iterator[tuple[int, Output]]:
        """Queue what is ready, as far as there is room; yields what the engine refuses."""
        while running.ready and self._engine.room:
            place, request = running.ready.popleft()
            try:
                self._engine.submit(request)
                running.places[request] = place
            except RequestError as error:
                yield place, Output.refused(str(error))
