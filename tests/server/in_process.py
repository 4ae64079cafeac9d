"""A server whose engine computes nothing, both sides in threads of this process: thousands of requests in seconds.

Tokens are hashes of what comes before them (tests/engine/fake_executable.py), so that every answer is known, and the
executable finds a page that was given away too early.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from fake_executable import VOCABULARY, FakeExecutable, buckets_of
from server_process import WAIT_SECONDS

from makeready.engine.conversation import Parsers
from makeready.engine.front import Bounds, Front
from makeready.engine.loop import Engine
from makeready.engine.metrics import Metrics
from makeready.engine.options import SchedulerOptions
from makeready.engine.remote.channel import Channel
from makeready.engine.remote.client import EngineClient
from makeready.engine.remote.host import Host
from makeready.engine.remote.messages import Load, Loaded, ToHost
from makeready.engine.server.run import Listening, _config, _Server, bind, keep_files, listen_rpc
from makeready.engine.server.service import Service
from makeready.engine.server.settings import ServerSettings
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.plan.spec import Bucket, Limits

LIMITS = Limits(max_rows=16, max_tokens=64, context_len=256, page_size=4)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "model_type": "llama",
}


class SlowExecutable(FakeExecutable):
    """Takes its time for a step, and where a test shuts its gate, stands before those that are not allowed.

    Attributes:
        seconds: a step.
        failure: what the next step raises.
    """

    seconds = 0.0
    failure: Exception | None = None
    _gate: threading.Semaphore | None = None

    def shut(self) -> None:
        """Launch no step until :meth:`allow`."""
        self._gate = threading.Semaphore(0)

    def allow(self, steps: int) -> None:
        """Let so many through the gate."""
        assert self._gate is not None
        self._gate.release(steps)

    def open(self) -> None:
        """Let all through from now on."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.release()

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> Any:
        if (gate := self._gate) is not None:
            gate.acquire()
        if self.failure is not None:
            raise self.failure
        time.sleep(self.seconds)
        return super().launch(bucket, step, cut=cut)


class InProcess:
    """A server on a port of its own.

    Attributes:
        engine: its engine, which is this test's to look at when nothing runs.
        url: where it listens.
        grpc: host and port of its gRPC, where that is asked for.
    """

    grpc: str

    def __init__(self, settings: ServerSettings, *, rpc: bool = False, **options: Any) -> None:
        self._speaks_rpc = rpc
        self.executable = SlowExecutable(LIMITS, buckets_of(LIMITS, logprob_tokens=16), pages=1200)
        self.engine = Engine(self.executable, SchedulerOptions(**options))
        self.failure: BaseException | None = None
        self._settings, self._ready = settings, threading.Event()
        self._ours, self._theirs = socket.socketpair()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._host, self._serve)]
        for thread in self.threads:
            thread.start()
        assert self._ready.wait(WAIT_SECONDS)

    @property
    def steps(self) -> int:
        """Steps that were launched."""
        return len(self.executable.steps)

    def settle(self) -> None:
        """Let the server's side do what it has begun."""
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result(WAIT_SECONDS)

    def close(self) -> None:
        """End both sides."""
        self.executable.open()
        self.loop.call_soon_threadsafe(self._end)
        for thread in self.threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()

    def _end(self) -> None:
        self.server.should_exit = True

    def _host(self) -> None:
        channel = Channel[ToHost](self._theirs, ToHost)
        while not channel.receive(1.0):
            pass
        facts = {"kv_pages": 1199, "architecture": CONFIG["architectures"][0]}
        channel.send(Loaded(LIMITS, VOCABULARY, list(self.engine.executable.plan.steps), "", facts))
        try:
            Host(self.engine, None, channel).run()
        except BaseException as error:
            self.failure = error
            self._theirs.close()

    def _serve(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        client = EngineClient(lambda kind, text: None)
        await client.connect(self._ours, Load("dummy", None, None, {}, None, SchedulerOptions()))
        bounds = Bounds(LIMITS, VOCABULARY, client.loaded.steps)  # type: ignore[union-attr]
        front = Front(open_checkpoint("dummy", config=CONFIG), bounds, Parsers(), warn=print)
        self.service = Service(client, front, self._settings, Metrics("fake"))
        if self._settings.files_dir is not None:
            keep_files(self.service, self._settings.files_dir)
        at = Listening("127.0.0.1", 0)
        rpc = listen_rpc(at, 0, self._settings.max_body_bytes) if self._speaks_rpc else None
        if rpc is not None:
            await rpc.start(self.service)
            self.grpc = f"127.0.0.1:{rpc.port}"
        self.server = _Server(_config(self.service, at))
        with bind(at) as sock:
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            serving = asyncio.ensure_future(self.server.serve(sockets=[sock]))
            while not self.server.started:
                await asyncio.sleep(0.001)
            self._ready.set()
            await serving
        if rpc is not None:
            await rpc.stop(0)
        if self.service.batches is not None:
            await self.service.batches.close()
        await client.close()


@contextmanager
def served(
    settings: ServerSettings | None = None, *, rpc: bool = False, **options: Any
) -> Iterator[InProcess]:
    """A server, with gRPC where that is asked for, whose pages are all given back in the end."""
    made = InProcess(settings or ServerSettings(["fake"]), rpc=rpc, **options)
    try:
        yield made
    finally:
        made.close()
    assert made.failure is None, made.failure
    assert not made.engine.busy
    assert made.engine.pool.held == 0
    made.engine.pool.check()
