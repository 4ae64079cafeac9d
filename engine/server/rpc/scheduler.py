"""SGLang's scheduler service: generation, and what gateways ask beside it."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Mapping
from typing import Any

import grpc
from smg_grpc_proto.generated import common_pb2, sglang_scheduler_pb2, sglang_scheduler_pb2_grpc

from makeready.engine.protocol.sglang_grpc.answer import Answers
from makeready.engine.protocol.sglang_grpc.body import read
from makeready.engine.server.access import Access, check_access
from makeready.engine.server.problem import ServeError
from makeready.engine.server.rpc import told
from makeready.engine.server.rpc.calls import Context, call, code_of, headers_of, refuse, told_of
from makeready.engine.server.service import Service
from makeready.engine.server.work import Work
from makeready.engine.text.bundle import bundle

NAME = sglang_scheduler_pb2.DESCRIPTOR.services_by_name["SglangScheduler"].full_name
PART_BYTES = 64 << 10  # of a tokenizer in one message
# Methods of the service that are not served, and why.
UNSERVED: Mapping[str, str] = {
    "Embed": "this server generates text, and makes no embeddings",
    "StartProfile": "there is no profiler; HTTP's /live tells every step as it runs",
    "StopProfile": "there is no profiler; HTTP's /live tells every step as it runs",
    "SubscribeKvEvents": "the prefix cache tells no events",
    "LoadLoRAAdapter": "adapters are not served",
    "UnloadLoRAAdapter": "adapters are not served",
    "ListLoadedLoRAAdapters": "adapters are not served",
}


class Scheduler(sglang_scheduler_pb2_grpc.SglangSchedulerServicer):
    """Answers calls.

    Attributes:
        service: whose engine runs what they ask for.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._archive: asyncio.Future[bytes] | None = None

    async def Generate(self, request: Any, context: Context) -> None:  # noqa: N802
        """Tokens for tokens: chunks where ``stream`` asks for them, and the whole of each sample."""
        work = Work(self.service, request.request_id or uuid.uuid4().hex, headers_of(context))
        work.streams = request.stream
        code = grpc.StatusCode.CANCELLED
        try:
            await self._generate(work, request, context)
            code = grpc.StatusCode.OK
        except Exception as error:
            work.problem = told_of(error, f"request {work.id}")
            code = code_of(work.problem)
            await refuse(context, work.problem)
        finally:
            # The client has gone, or the server ends, or all is said.
            work.close(
                {
                    "rpc.system": "grpc",
                    "rpc.service": NAME,
                    "rpc.method": "Generate",
                    "rpc.grpc.status_code": code.value[0],
                }
            )

    async def _generate(self, work: Work, request: Any, context: Context) -> None:
        check_access(Access.USER, work.headers, self.service.settings)
        asked = read(request)
        running = await work.start(asked.ask)
        answers = Answers(work.id, running.replies, asked.interval)
        if not asked.stream:
            for message in answers.whole(await running.all()):
                await context.write(message)
            return
        async for pieces in running.pieces():
            for message in answers.take(pieces):
                await context.write(message)

    @call(Access.ADMIN)
    async def Abort(self, request: Any, context: Context) -> Any:  # noqa: N802
        """End a request where it stands; its answer is what there is of it."""
        if not request.request_id:
            raise ServeError(400, "request_id is empty; name the request", "request_id")
        count = self.service.abort(request.request_id)
        message = f"{request.request_id[:200]} {'is ended' if count else 'does not run'}"
        return sglang_scheduler_pb2.AbortResponse(success=count > 0, message=message)

    @call(Access.FREE)
    async def HealthCheck(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Whether requests are taken and the engine lives, by its last sign of life."""
        service, message = self.service, "requests are taken"
        if not service.healthy:
            message = "the engine gives no sign of life"
        elif service.draining:
            message = "the server ends"
        return sglang_scheduler_pb2.HealthCheckResponse(healthy=service.ready, message=message)

    @call(Access.USER)
    async def GetModelInfo(self, request: Any, context: Context) -> Any:  # noqa: N802
        """The model, as those need it who tokenize for it."""
        return told.model(self.service)

    @call(Access.USER)
    async def GetServerInfo(self, request: Any, context: Context) -> Any:  # noqa: N802
        """The plan, and what it runs on."""
        return told.server(self.service)

    @call(Access.USER)
    async def GetLoads(self, request: Any, context: Context) -> Any:  # noqa: N802
        """How much there is to do."""
        if request.HasField("dp_rank") and request.dp_rank != 0:
            raise ServeError(400, f"dp_rank={request.dp_rank} is not here; there is one, 0", "dp_rank")
        return told.loads(self.service, request.include)

    @call(Access.ADMIN)
    async def FlushCache(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Forget cached prefixes, once nothing runs or within the time that is given for that."""
        service = self.service
        until = asyncio.get_running_loop().time() + max(0.0, min(request.timeout_s, told.LONGEST_SECONDS))
        while service.running and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(told.POLL_SECONDS)
        if service.running:
            message = f"{len(service.running)} requests are under way; ask again when they are done"
            return common_pb2.FlushCacheResponse(success=False, message=message)
        pages = await service.client.flush()
        return common_pb2.FlushCacheResponse(success=True, message=f"{pages} pages are forgotten")

    @call(Access.USER)
    async def GetTokenizer(self, request: Any, context: Context) -> None:  # noqa: N802
        """The tokenizer's files, as a zip archive in parts; the last has its SHA-256."""
        front = self.service.front
        if front.tokenizer is None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "the checkpoint has no tokenizer; send token ids"
            )
        if self._archive is None:  # made once
            tokenizer = front.tokenizer
            self._archive = asyncio.ensure_future(
                self.service.apart(lambda: bundle(front.checkpoint, tokenizer))
            )
        try:
            data = await asyncio.shield(self._archive)
        except Exception:
            self._archive = None
            raise
        for start in range(0, len(data), PART_BYTES):
            part, last = data[start : start + PART_BYTES], start + PART_BYTES >= len(data)
            digest = hashlib.sha256(data).hexdigest() if last else ""
            await context.write(common_pb2.GetTokenizerChunk(data=part, sha256=digest))


def _refusing(name: str, reason: str) -> Any:
    async def refused(self: Scheduler, request: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not served: {reason}")

    return call(Access.USER)(refused)


for _name, _reason in UNSERVED.items():
    setattr(Scheduler, _name, _refusing(_name, _reason))
