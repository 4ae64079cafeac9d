"""A route, and what is done for each of them: access, body, errors in its protocol's shape, clients that leave."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from makeready.engine.server.access import Access, check_access
from makeready.engine.server.problem import ServeError, problem_of
from makeready.engine.server.service import Service
from makeready.engine.server.work import Work

JSON = "application/json"
IGNORED = "x-makeready-ignored-fields"
REQUEST_ID = "x-request-id"

_LOG = logging.getLogger("makeready.server")
_IDENTITY = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class Answer:
    """A response that is there as a whole."""

    body: bytes
    status: int = 200
    type: str = JSON


@dataclass(frozen=True)
class Stream:
    """A response that goes on: each item is sent as it comes, as fast as the client takes it."""

    items: AsyncIterator[bytes]
    type: str = "text/event-stream; charset=utf-8"


def answer(value: Any, status: int = 200) -> Answer:
    """A value as JSON; what JSON has not, such as infinities, is null."""
    return Answer(msgspec.json.encode(value), status)


def event(value: Any) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """The same with a name, as protocols have it whose events are of several kinds."""
    return b"event: " + name.encode() + b"\n" + event(value)


DONE, ALIVE = b"data: [DONE]\n\n", b": alive\n\n"


Shape = Callable[[ServeError], Any]
"""A problem as a protocol's error object."""


@dataclass
class Exchange(Work):
    """A request and its answer.

    Attributes:
        id: the client's name for it, or ours; the answer repeats it.
        path: parameters of the path.
        headers: of the request.
        body: of the request.
        answer_headers: of the answer.
        words: how errors are written from now on, where the route can say it better.
    """

    path: Mapping[str, str]
    query: bytes = b""
    body: bytes = b""
    answer_headers: dict[str, str] = field(default_factory=dict)
    words: Shape | None = None

    def json(self) -> dict[str, Any]:
        """The body, which has to be a JSON object.

        Raises:
            ServeError: it is not.
        """
        try:
            value = msgspec.json.decode(self.body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ServeError(
                400, f"the body is not JSON: {str(error) or 'nested too deeply'}; correct it"
            ) from None
        if not isinstance(value, dict):
            raise ServeError(400, "the body is no JSON object; write {...}")
        return value

    def ignore(self, names: Collection[str]) -> None:
        """Say in the answer's headers that fields were not understood, or refuse them where that is wanted.

        Raises:
            ServeError: naming the first.
        """
        if not names:
            return
        first = next(iter(names))
        if self.service.settings.strict_fields:
            raise ServeError(
                400,
                f"{first[:100]} is no field that is served; leave it out, or start without strict_fields",
                first,
            )
        shown = [name for name in names if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)]
        self.answer_headers[IGNORED] = ", ".join(shown[:32]) or "?"


Endpoint = Callable[[Exchange], Awaitable["Answer | Stream"]]


@dataclass(frozen=True)
class Route:
    """A path that is answered.

    Attributes:
        path: with parameters in braces, as starlette has them.
        shape: how its protocol writes errors.
        broken: how a stream of it ends that cannot go on; None: with the error as an event.
        body: the JSON Schema of its body, for ``/openapi.json``; None where it has none.
        takes: the media type of its body.
    """

    path: str
    endpoint: Endpoint
    shape: Shape
    methods: Sequence[str] = ("POST",)
    access: Access = Access.USER
    broken: Callable[[ServeError], bytes] | None = None
    body: Mapping[str, Any] | None = None
    takes: str = JSON


class Served:
    """A route as an ASGI application."""

    def __init__(self, route: Route, service: Service) -> None:
        self._route, self._service = route, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        exchange = Exchange(
            self._service,
            scope["state"]["request_id"],
            headers,
            scope.get("path_params", {}),
            scope.get("query_string", b""),
        )
        try:
            check_access(self._route.access, headers, self._service.settings)
            exchange.body = await _body(receive, headers, self._service.settings.max_body_bytes)
        except _LeftError:
            return
        except ServeError as problem:
            await self._refuse(exchange, problem, send)
            return
        work = asyncio.ensure_future(self._work(exchange, send))
        watch = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            # The client has gone, or the server ends, or all is said.
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
            status = 200 if exchange.problem is None else exchange.problem.status
            exchange.close(
                {
                    "http.request.method": scope["method"],
                    "http.route": self._route.path,
                    "http.response.status_code": status,
                }
            )

    async def _work(self, exchange: Exchange, send: Send) -> None:
        try:
            made = await self._route.endpoint(exchange)
        except Exception as error:
            await self._refuse(exchange, _told(error, exchange), send)
            return
        exchange.streams = isinstance(made, Stream)
        if isinstance(made, Answer):
            await _whole(send, made.status, made.type, made.body, exchange.answer_headers)
            return
        exchange.answer_headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        await _begin(send, 200, made.type, exchange.answer_headers)
        try:
            async for item in made.items:
                await send({"type": "http.response.body", "body": item, "more_body": True})
        except Exception as error:
            problem = _told(error, exchange)
            broken = self._route.broken or (lambda problem: event(self._shape(exchange)(problem)) + DONE)
            await send({"type": "http.response.body", "body": broken(problem), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _shape(self, exchange: Exchange) -> Shape:
        return exchange.words or self._route.shape

    async def _refuse(self, exchange: Exchange, problem: ServeError, send: Send) -> None:
        body = msgspec.json.encode(self._shape(exchange)(problem))
        headers = exchange.answer_headers | problem.headers
        await _whole(send, problem.status, JSON, body, headers)


def identity_of(headers: Headers) -> str:
    """The client's name for a request where it has one that can be written, else a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _IDENTITY.fullmatch(given) else uuid.uuid4().hex


class _LeftError(Exception):
    """The client has gone."""


async def _body(receive: Receive, headers: Headers, most: int) -> bytes:
    stated = headers.get("content-length", "")
    too_large = ServeError(413, f"the body is larger than {most:,} bytes; send less, or raise max_body_mib")
    if stated.isdecimal() and int(stated) > most:
        raise too_large
    parts, size = list[bytes](), 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise _LeftError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(parts)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _begin(send: Send, status: int, kind: str, headers: Mapping[str, str]) -> None:
    raw = [(b"content-type", kind.encode())]
    raw += [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _whole(send: Send, status: int, kind: str, body: bytes, headers: Mapping[str, str]) -> None:
    await _begin(send, status, kind, {**headers, "content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _told(error: BaseException, exchange: Exchange) -> ServeError:
    problem = exchange.problem = problem_of(error)
    if problem.status == 500:
        _LOG.error("request %s failed: %s", exchange.id, problem.message, exc_info=error)
    return problem
