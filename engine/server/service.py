"""What all protocols share: from what a body asks for to the pieces of its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from makeready.engine.front import Defaults, Front
from makeready.engine.given import samples_of
from makeready.engine.metrics import Metrics
from makeready.engine.output import Output
from makeready.engine.pieces import Piece
from makeready.engine.protocol.asked import Ask
from makeready.engine.remote.client import EngineClient
from makeready.engine.remote.messages import Loaded
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ERROR
from makeready.engine.server.live import Live, Predict
from makeready.engine.server.problem import STARTING_SECONDS, ServeError
from makeready.engine.server.settings import ServerSettings
from makeready.engine.step_record import StepRecord

if TYPE_CHECKING:
    from makeready.engine.server.batches import Batches
    from makeready.engine.server.files import Store
    from makeready.engine.server.tracing import Tracing

T = TypeVar("T")

THREADS = 4  # that tokenize and render: long ones let the interpreter go on meanwhile
MOST_SAMPLES = 4096  # of one request: each takes memory before it runs
QUIET_SECONDS = 15.0  # without news, after which a stream says that it is alive


def check_samples(count: int) -> None:
    """Raise :class:`ServeError` where a request asks for too many answers at once."""
    if count > MOST_SAMPLES:
        raise ServeError(
            400, f"{count:,} answers are asked for at once, at most {MOST_SAMPLES:,} are given; ask for fewer"
        )


class Running:
    """A request that the engine has taken in.

    Attributes:
        id: the request's own.
        key: the engine's name for it; later ones have larger.
        params: what its samples are generated with.
        outputs: of samples that are final, by their number.
    """

    def __init__(self, service: Service, identity: str, params: SamplingParams, replies: list[Reply]) -> None:
        self.id, self.params, self.replies = identity, params, replies
        self.outputs: dict[int, Output] = {}
        self._service = service
        self.key, self._call = service.client.submit(replies)

    async def accepted(self) -> None:
        """Wait until it is in the engine's queue; see :meth:`Call.accepted` for what is raised."""
        await self._call.accepted()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What becomes known of its samples; an empty list where nothing did for a while.

        Raises:
            ServeError: a sample could not go on.
        """
        async for pieces in self._call.pieces(QUIET_SECONDS):
            for piece in pieces:
                if piece.output is not None:
                    self._final(piece.index, piece.output)
            yield pieces

    async def all(self) -> list[Output]:
        """Its samples when all are final.

        Raises:
            ServeError: one could not go on.
        """
        async for _ in self.pieces():
            pass
        return [self.outputs[index] for index in range(len(self.replies))]

    def abort(self) -> None:
        """End it where it stands; its answer is what there is of it."""
        self._service.client.abort(self.key)

    def close(self) -> None:
        """Nobody wants to know any more of it."""
        self._service.client.drop(self.key)
        if len(self.outputs) < len(self.replies):
            self._service.metrics.aborted(len(self.replies) - len(self.outputs))

    def _final(self, index: int, output: Output) -> None:
        self.outputs[index] = output
        self._service.metrics.finish(output)
        if output.finish_reason == ERROR:
            raise ServeError(500 if index in self._call.faults else 400, output.error or "it could not go on")


class Service:
    """A model that answers requests.

    Args:
        client: of the engine, which has loaded the model.
        front: makes requests for it.
        predict: what steps should take, for those who watch.

    Attributes:
        running: requests under way.
        draining: whether no further ones are taken.
        began: ``time.time`` of its start.
        live: what is told to those who watch.
        tracing: makes spans of requests; None where nobody wants them.
        store, batches: files of clients and the batches over them; None where none are kept.
    """

    def __init__(
        self,
        client: EngineClient,
        front: Front,
        settings: ServerSettings,
        metrics: Metrics,
        predict: Predict | None = None,
    ) -> None:
        self.client, self.front, self.settings, self.metrics = client, front, settings, metrics
        self.running: set[Running] = set()
        self.draining = False
        self.began = int(time.time())
        self.store: Store | None = None
        self.batches: Batches | None = None
        self.tracing: Tracing | None = None
        self._threads = ThreadPoolExecutor(THREADS, "makeready text")
        stated = front.generation_defaults
        self._defaults = Defaults(dict(stated), dict(settings.template), fit="max_new_tokens" in stated)
        self.live = Live(self, predict)  # pyright: ignore[reportArgumentType]
        client.observer = self._step

    def _step(self, record: StepRecord) -> None:
        self.metrics.step(record)
        self.live.step(record)

    @property
    def loaded(self) -> Loaded:
        """What the engine said of the model."""
        assert self.client.loaded is not None
        return self.client.loaded

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.settings.names[0]

    @property
    def healthy(self) -> bool:
        """Whether the engine lives, by its last sign of life."""
        silent = time.monotonic() - self.client.beat
        return not self.client.gone.done() and silent < self.settings.health_seconds

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.healthy and not self.draining

    def check_model(self, name: str) -> None:
        """Raise :class:`ServeError` where a model is asked for that is not here."""
        if name not in self.settings.names:
            names = ", ".join(self.settings.names)
            raise ServeError(
                404, f"there is no model {name[:200]!r}; it is called {names}", "model", "model_not_found"
            )

    async def apart(self, work: Callable[[], T]) -> T:
        """Do what takes a while in a thread, while others are answered."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def start(self, ask: Ask, identity: str) -> Running:
        """Have the engine run what a body asks for; whoever asked closes it in the end.

        Raises:
            RequestError, TextError: it cannot be served.
            ServeError, UnavailableError, EngineGoneError: it is not served now.
        """
        if self.draining:
            message = "the server ends, and takes no further requests; ask another one"
            raise ServeError(503, message, retry_seconds=STARTING_SECONDS)
        check_samples(len(ask.prompts) * samples_of(ask.sampling))
        try:
            params, replies = await self.apart(lambda: self.front.asked(ask, self._defaults))
            running = Running(self, identity, params, replies)
        except ValueError as error:
            self.metrics.finish(Output.refused(str(error)))
            raise
        self.running.add(running)
        try:
            await running.accepted()
        except BaseException:
            self.end(running)
            raise
        return running

    def end(self, running: Running) -> None:
        """Forget a request, and end it if it is not final."""
        if running in self.running:
            self.running.remove(running)
            running.close()
            self.live.ended(running)  # pyright: ignore[reportArgumentType]

    def abort(self, identity: str | None) -> int:
        """End requests of an id, or all for None, where they stand; returns how many that were."""
        found = [running for running in self.running if identity in (None, running.id)]
        for running in found:
            running.abort()
        return len(found)

    async def drained(self) -> None:
        """Wait until no request is under way, as long as the settings allow."""
        until = time.monotonic() + self.settings.drain_seconds
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.05)
