"""The server's process: load the model in another one, listen, drain, end."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from makeready.engine.conversation import Parsers
from makeready.engine.front import Bounds, Front
from makeready.engine.generation_config import told
from makeready.engine.metrics import Metrics
from makeready.engine.remote.client import EngineClient, EngineGoneError, LoadError
from makeready.engine.remote.messages import Load
from makeready.engine.server.app import make_app
from makeready.engine.server.batches import Batches
from makeready.engine.server.files import Store
from makeready.engine.server.predicted import predicted
from makeready.engine.server.service import Service
from makeready.engine.server.settings import ServerSettings
from makeready.graphs.checkpoint.base import open_checkpoint

if TYPE_CHECKING:
    from makeready.engine.server.rpc.server import RpcServer

_LOG = logging.getLogger("makeready.server")
LAST_SECONDS = 0.5  # for answers to be sent once nothing runs any more
ONCE_SECONDS = 1.0
FILES = 65536  # that may be open, where the system allows: a connection is one


class ServeFailedError(ValueError):
    """The server cannot go on; a sentence that says why."""


@dataclass(frozen=True)
class Listening:
    """Where a server listens.

    Attributes:
        port: 0 for one that is free.
        certificate, key: files of TLS; None for none.
        access_log: a line a request of HTTP.
        grpc_port: of gRPC, 0 for one that is free; None for no gRPC.
    """

    host: str
    port: int
    certificate: str | None = None
    key: str | None = None
    access_log: bool = False
    grpc_port: int | None = None


@dataclass(frozen=True)
class ModelOptions:
    """What is made of a checkpoint on the side of text; as for :class:`makeready.engine.llm.LLM`."""

    parsers: Parsers
    chat_template: str | None = None
    generation_config: bool = True


class Signals:
    """The first signal ends a server when nothing runs any more, the second ends it now.

    Launchers pass on what the terminal sent as well: signals within a second are one.

    Attributes:
        came: which signals did.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self._last = -math.inf
        self._told = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._take, number)

    async def next(self) -> int:
        """Wait for another one."""
        self._told.clear()
        await self._told.wait()
        return self.came[-1]

    def _take(self, number: int) -> None:
        before, self._last = self._last, time.monotonic()
        if self._last - before > ONCE_SECONDS:
            self.came.append(number)
            self._told.set()


class _Server(uvicorn.Server):
    """Signals are ours."""

    def capture_signals(self) -> Any:
        return nullcontext()


def bind(at: Listening) -> socket.socket:
    """Take an address, so that one that is in use is told of before a model is loaded.

    Raises:
        ServeFailedError: it cannot be had.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in at.host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((at.host, at.port))
    except OSError as error:
        sock.close()
        raise ServeFailedError(
            f"{at.host}:{at.port} cannot be listened at: {error.strerror}; choose another port or host"
        ) from None
    return sock


def run(
    at: Listening,
    load: Load,
    model: ModelOptions,
    settings: ServerSettings,
    note: Callable[[str, str], None],
    ready: Callable[[str], None],
) -> int:
    """Serve until a signal ends it.

    Args:
        note: told of how far the loading is; kind and text of a Note.
        ready: told the address once requests are taken.

    Returns:
        The signal that came before the model was loaded; 0 after a server that ended as it was told.

    Raises:
        LoadError, ServeFailedError: a sentence that says why.
    """
    return _run_loop(serve(at, load, model, settings, note, ready))


def _run_loop(work: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


async def serve(
    at: Listening,
    load: Load,
    model: ModelOptions,
    settings: ServerSettings,
    note: Callable[[str, str], None],
    ready: Callable[[str], None],
) -> int:
    """See :func:`run`."""
    signals = Signals()
    _allow_files()
    rpc: RpcServer | None = None
    with bind(at) as sock:
        if at.grpc_port is not None:
            rpc = listen_rpc(at, at.grpc_port, settings.max_body_bytes)
        loading = asyncio.ensure_future(EngineClient.start(load, note))
        stopped = asyncio.ensure_future(signals.next())
        await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            loading.cancel()  # the host ends with this process
            return stopped.result()
        try:
            client = loading.result()
        except EngineGoneError as error:
            raise LoadError(f"{error} while it loaded the model; see what it said above") from None
        service: Service | None = None
        try:
            front, metrics = _front(client, load, model, note), Metrics(settings.names[0])
            service = Service(client, front, settings, metrics, partial(predicted, load))
            if settings.otel:
                from makeready.engine.server.tracing import Tracing

                service.tracing = Tracing()
            if settings.files_dir is not None:
                keep_files(service, settings.files_dir)
            server = _Server(_config(service, at))
            serving = asyncio.ensure_future(server.serve(sockets=[sock]))
            while not (server.started or serving.done()):
                await asyncio.sleep(0.01)
            if server.started:
                address = f"http{'s' if at.certificate else ''}://{at.host}:{sock.getsockname()[1]}"
                if rpc is not None:
                    await rpc.start(service)
                    address += f" and grpc://{at.host}:{rpc.port}"
                ready(address)
            await _until_end(service, server, serving, stopped, signals)
        finally:
            stopped.cancel()
            if rpc is not None:
                await rpc.stop(LAST_SECONDS)
            if service is not None:
                await service.live.close()
                if service.tracing is not None:
                    await asyncio.to_thread(service.tracing.close)
                if service.batches is not None:
                    await service.batches.close()
            await client.close()
    return 0


def listen_rpc(at: Listening, port: int, most_bytes: int) -> RpcServer:
    """Take an address for gRPC; needs the extra ``grpc``.

    Raises:
        ServeFailedError: it cannot be had.
    """
    from makeready.engine.server.rpc.server import RpcServer

    try:
        return RpcServer(at.host, port, most_bytes, at.certificate, at.key)
    except OSError as error:
        raise ServeFailedError(
            f"{at.host}:{port} cannot be listened at for gRPC: {error}; choose another grpc_port or host"
        ) from None


def keep_files(service: Service, folder: Path) -> None:
    """Have a server keep files in a folder, and go on with the batches that are there."""
    service.store = Store(folder)
    service.batches = Batches(service, service.store)


async def _until_end(
    service: Service,
    server: _Server,
    serving: asyncio.Future[None],
    stopped: asyncio.Future[int],
    signals: Signals,
) -> None:
    gone = service.client.gone
    await asyncio.wait((serving, gone, stopped), return_when=asyncio.FIRST_COMPLETED)
    if stopped.done() and not gone.done():
        service.draining = True
        drained = asyncio.ensure_future(service.drained())
        again = asyncio.ensure_future(signals.next())
        await asyncio.wait((drained, again, gone, serving), return_when=asyncio.FIRST_COMPLETED)
        if again.done() or service.running:
            _LOG.warning("%d requests are ended where they stand", len(service.running))
        for task in (drained, again):
            task.cancel()
    lost = gone.done()
    if lost:
        _LOG.error("%s; the server ends", gone.result())
    until = asyncio.get_running_loop().time() + LAST_SECONDS
    while service.running and not (signals.came[1:] or asyncio.get_running_loop().time() > until):
        await asyncio.sleep(0.01)
    server.should_exit = True
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(serving), 2 * LAST_SECONDS)
    server.force_exit = True
    await serving
    if lost:
        raise ServeFailedError(f"{gone.result()}; start the server again")


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _config(service: Service, at: Listening) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service),
        ssl_certfile=at.certificate,
        ssl_keyfile=at.key,
        lifespan="off",
        ws="none",
        log_level="info" if at.access_log else "warning",
        access_log=at.access_log,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than those in front of it keep a connection, usually 60 s
        timeout_graceful_shutdown=1,
    )


def _front(client: EngineClient, load: Load, model: ModelOptions, note: Callable[[str, str], None]) -> Front:
    loaded = client.loaded
    assert loaded is not None
    checkpoint = open_checkpoint(load.checkpoint, config=load.model)
    front = Front(
        checkpoint,
        Bounds(loaded.limits, loaded.vocabulary, loaded.steps),
        model.parsers,
        chat_template=model.chat_template,
        generation_config=model.generation_config,
        warn=_LOG.warning,
    )
    for sentence in front.tokenizer.warnings if front.tokenizer else ():
        note("report", sentence)
    if front.generation_defaults:
        note("report", told(front.generation_defaults))
    return front
