"""OpenAI's Responses. Bodies and answers: :mod:`makeready.engine.protocol.responses`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from makeready.engine.protocol.openai import body as chats
from makeready.engine.protocol.openai.chunks import streaming_of
from makeready.engine.protocol.responses.answer import ResponseEvents
from makeready.engine.protocol.responses.body import chat_of, schema, unknown
from makeready.engine.server.problem import ServeError
from makeready.engine.server.route import ALIVE, Answer, Exchange, Route, Stream, answer, named_event
from makeready.engine.server.routes.openai import check_template_text, shape
from makeready.engine.server.service import Running


async def _create(exchange: Exchange) -> Answer | Stream:
    body = exchange.json()
    exchange.ignore(unknown(body))
    stream = streaming_of({"stream": body.get("stream")}).stream
    body.setdefault("model", exchange.service.name)
    ask = chats.read(chats.CHAT, chat_of(body))
    check_template_text(ask)
    exchange.service.check_model(body["model"])
    running = await exchange.start(ask)
    events = ResponseEvents(running.id, body, running.params, exchange.service.front.tokenizer)
    if stream:
        return Stream(_events(running, events))
    async for pieces in running.pieces():
        for piece in pieces:
            for _ in events.take(piece):
                pass
    return answer(events.response)


async def _events(running: Running, events: ResponseEvents) -> AsyncIterator[bytes]:
    yield b"".join(map(_sent, events.begin()))
    async for pieces in running.pieces():
        yield b"".join(_sent(event) for piece in pieces for event in events.take(piece)) or ALIVE


def _sent(event: dict[str, Any]) -> bytes:
    return named_event(event["type"], event)


def _broken(problem: ServeError) -> bytes:
    error = shape(problem)["error"]
    fields = {name: error[name] for name in ("message", "param")}
    return named_event("error", {"type": "error", "code": error["code"] or error["type"], **fields})


ROUTES = [Route("/v1/responses", _create, shape, broken=_broken, body=schema())]
