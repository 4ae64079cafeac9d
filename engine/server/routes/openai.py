"""OpenAI's API: chat, completions, models. Bodies and answers: :mod:`makeready.engine.protocol.openai`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from makeready.engine.protocol.asked import Ask
from makeready.engine.protocol.openai import body as bodies
from makeready.engine.protocol.openai.answer import answer as whole_answer
from makeready.engine.protocol.openai.answer import error_object, refusal
from makeready.engine.protocol.openai.chunks import (
    FIELDS,
    ChatChunks,
    CompletionChunks,
    head_of,
    streaming_of,
)
from makeready.engine.server.problem import ServeError
from makeready.engine.server.route import (
    ALIVE,
    DONE,
    Answer,
    Exchange,
    Route,
    Stream,
    answer,
    event,
)
from makeready.engine.server.service import Running
from makeready.engine.text.chat import is_template

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def shape(problem: ServeError, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A problem as OpenAI's ``error`` object, in the words of the request's body."""
    if problem.status == 400:
        made = refusal(body or {}, problem.message, problem.field)
        made["error"]["code"] = problem.code
        return made
    kind = _TYPES.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error")
    return error_object(problem.message, kind, problem.field, problem.code)


def check_template_text(ask: Ask) -> None:
    """Raise :class:`ServeError` for a template that is the name of a file: a body is data."""
    if not is_template(ask.text.get("chat_template", "{")):
        raise ServeError(400, "chat_template must be a template's text; files are not read", "chat_template")


async def _generate(url: str, exchange: Exchange) -> Answer | Stream:
    """What a model says, whole or as it says it."""
    body = exchange.json()
    streaming = streaming_of(body)
    asked = {name: value for name, value in body.items() if name not in FIELDS and value is not None}
    asked.setdefault("model", exchange.service.name)
    unknown = bodies.unknown(url, asked)
    exchange.ignore(unknown)
    for name in unknown:
        del asked[name]
    exchange.words = partial(shape, body=asked)
    ask = bodies.read(url, asked)
    check_template_text(ask)
    exchange.service.check_model(asked["model"])
    running = await exchange.start(ask)
    if streaming.stream:
        tokenizer, chat = exchange.service.front.tokenizer, url == bodies.CHAT
        head = head_of(chat, running.id, asked["model"])
        made = (head, streaming, running.replies, running.params.n, tokenizer)
        return Stream(_events(running, ChatChunks(*made) if chat else CompletionChunks(*made, asked)))
    outputs = await running.all()
    tokenizer = exchange.service.front.tokenizer
    return answer(whole_answer(url, asked, outputs, running.params, tokenizer, running.id))


async def _events(running: Running, chunks: ChatChunks | CompletionChunks) -> AsyncIterator[bytes]:
    async for pieces in running.pieces():
        sent = b"".join(event(chunk) for chunk in chunks.take(pieces))
        if sent or not pieces:
            yield sent or ALIVE
    yield b"".join([*map(event, chunks.end()), DONE])


def _model(exchange: Exchange, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": exchange.service.began,
        "owned_by": "makeready",
        "root": exchange.service.name,
        "parent": None,
        "max_model_len": exchange.service.loaded.limits.context_len,
    }


async def _models(exchange: Exchange) -> Answer:
    names = exchange.service.settings.names
    return answer({"object": "list", "data": [_model(exchange, name) for name in names]})


async def _one_model(exchange: Exchange) -> Answer:
    exchange.service.check_model(exchange.path["id"])
    return answer(_model(exchange, exchange.path["id"]))


ROUTES = [
    *(
        Route(url, partial(_generate, url), shape, body=bodies.schema(url))
        for url in (bodies.CHAT, bodies.COMPLETIONS)
    ),
    Route("/v1/models", _models, shape, ("GET",)),
    Route("/v1/models/{id:path}", _one_model, shape, ("GET",)),
]
