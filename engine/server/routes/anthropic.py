"""Anthropic's messages. Bodies and answers: :mod:`makeready.engine.protocol.anthropic`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from makeready.engine.protocol.anthropic.answer import MessageEvents, error_object, ping
from makeready.engine.protocol.anthropic.body import read, schema, wants_thinking
from makeready.engine.protocol.asked import Ask
from makeready.engine.server.problem import ServeError
from makeready.engine.server.route import Answer, Exchange, Route, Stream, answer, named_event
from makeready.engine.server.routes.openai import check_template_text
from makeready.engine.server.service import Running


def shape(problem: ServeError, request_id: str | None = None) -> dict[str, Any]:
    """A problem as Anthropic's ``error`` object."""
    return error_object(problem.status, problem.message, request_id)


async def _create(exchange: Exchange) -> Answer | Stream:
    body, ask, ignored = _asked(exchange)
    running = await exchange.start(ask)
    (reply,) = running.replies
    if wants_thinking(body) and (reply.reading is None or reply.reading.format.reasoning is None):
        exchange.ignore([*ignored, "thinking"])
    events = MessageEvents(running.id, body, len(reply.sequence.prompt))
    if body.get("stream"):
        return Stream(_events(running, events))
    async for pieces in running.pieces():
        for piece in pieces:
            for _ in events.take(piece):
                pass
    return answer(events.message)


async def _count(exchange: Exchange) -> Answer:
    """Tokens of the prompt that a body comes to."""
    _, ask, _ = _asked(exchange, counts=True)
    front, settings = exchange.service.front, exchange.service.settings
    (messages,) = ask.prompts
    chat = {**settings.template, **ask.template, **ask.text, **ask.tools}
    ids, _ = await exchange.service.apart(lambda: front.rendered(messages, **chat))
    return answer({"input_tokens": len(ids)})


def _asked(exchange: Exchange, *, counts: bool = False) -> tuple[dict[str, Any], Ask, list[str]]:
    exchange.answer_headers["request-id"] = exchange.id  # where their clients look for it
    exchange.words = partial(shape, request_id=exchange.id)
    body = exchange.json()
    ask, ignored = read(body, counts=counts)
    exchange.ignore(ignored)
    check_template_text(ask)
    if body.get("model") is None:
        body["model"] = exchange.service.name
    exchange.service.check_model(body["model"])
    return body, ask, ignored


async def _events(running: Running, events: MessageEvents) -> AsyncIterator[bytes]:
    yield b"".join(map(_sent, events.begin()))
    async for pieces in running.pieces():
        yield b"".join(_sent(event) for piece in pieces for event in events.take(piece)) or _sent(ping())


def _sent(event: dict[str, Any]) -> bytes:
    return named_event(event["type"], event)


def _broken(problem: ServeError) -> bytes:
    return _sent(shape(problem))


ROUTES = [
    Route("/v1/messages", _create, shape, broken=_broken, body=schema()),
    Route("/v1/messages/count_tokens", _count, shape, body=schema(counts=True)),
]
