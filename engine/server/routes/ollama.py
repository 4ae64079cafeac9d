"""Ollama's API. Bodies and answers: :mod:`makeready.engine.protocol.ollama`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import msgspec

from makeready.engine.errors import RequestError
from makeready.engine.front import Front
from makeready.engine.protocol.ollama.answer import Lines, error_object
from makeready.engine.protocol.ollama.body import CHAT, GENERATE, read, schema
from makeready.engine.protocol.ollama.model import (
    API_VERSION,
    TOOL,
    capabilities_of,
    entry_of,
    parameters_of,
    running_of,
    shown_of,
)
from makeready.engine.protocol.schema import BOOLEAN, STRING, body_schema
from makeready.engine.server.access import Access
from makeready.engine.server.problem import ServeError
from makeready.engine.server.route import Answer, Exchange, Route, Stream, answer
from makeready.engine.server.routes.openai import check_template_text
from makeready.engine.server.service import Running, Service
from makeready.engine.text.formats.scan import Reading
from makeready.engine.text.parts import TextError

LINES = "application/x-ndjson"


def shape(problem: ServeError) -> dict[str, Any]:
    """A problem as Ollama's ``error`` object."""
    return error_object(problem.message)


async def _run(url: str, exchange: Exchange) -> Answer | Stream:
    body, service = exchange.json(), exchange.service
    asked = read(url, body)
    exchange.ignore(asked.ignored)
    model = body.get("model") or service.name
    _check_model(service, model)
    lines = Lines(url == CHAT, model, service.front.tokenizer)
    if asked.ask is None:
        return answer(lines.loaded())
    check_template_text(asked.ask)
    running = await exchange.start(asked.ask)
    reading = running.replies[0].reading
    if asked.think and (reading is None or reading.format.reasoning is None):
        raise ServeError(400, f"{model} does not support thinking; leave think out", "think")
    if asked.stream:
        return Stream(_lines(running, lines), LINES)
    (output,) = await running.all()
    return answer(lines.whole(output))


async def _lines(running: Running, lines: Lines) -> AsyncIterator[bytes]:
    async for pieces in running.pieces():
        made = [line for piece in pieces for line in lines.take(piece)]
        # What says that a stream is alive has to be a line like others.
        yield b"".join(map(_sent, made if made or pieces else [lines.line()]))


def _sent(line: dict[str, Any]) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def _check_model(service: Service, name: str) -> None:
    """A model may be asked for by its name with the tag that stands for no tag."""
    plain = name.removesuffix(":latest")
    service.check_model(plain if plain in service.settings.names else name)


async def _tags(exchange: Exchange) -> Answer:
    service = exchange.service
    described = await service.apart(lambda: entry_of(service.front.checkpoint, *_files(service)))
    return answer({"models": [{"name": name, "model": name, **described} for name in service.settings.names]})


async def _ps(exchange: Exchange) -> Answer:
    """The models that are loaded, which are all, for as long as the server runs."""
    service = exchange.service
    context = service.loaded.limits.context_len
    described = await service.apart(lambda: running_of(service.front.checkpoint, _files(service)[0], context))
    return answer({"models": [{"name": name, "model": name, **described} for name in service.settings.names]})


async def _show(exchange: Exchange) -> Answer:
    body, service = exchange.json(), exchange.service
    exchange.ignore([name for name in body if name not in ("model", "name", "verbose")])
    name = body.get("model") or body.get("name")  # the older field
    if not isinstance(name, str):
        raise ServeError(400, "model must be a string", "model")
    _check_model(service, name)
    return answer(await service.apart(lambda: _shown(service)))


def _shown(service: Service) -> dict[str, Any]:
    front = service.front
    template = None if front.tokenizer is None else front.tokenizer.chat_template
    made = shown_of(front.checkpoint, service.loaded.limits.context_len, _files(service)[1])
    return made | {
        # One of several by name is what a conversation without tools gets.
        "template": (template.get("default") if isinstance(template, Mapping) else template) or "",
        "parameters": parameters_of(front.generation_defaults),
        "capabilities": capabilities_of(_reading(front), _reading(front, tools=[TOOL])),
    }


def _reading(front: Front, **template: Any) -> Reading | None:
    """How answers to a conversation are read; None also where there can be none."""
    try:
        return front.rendered([{"role": "user", "content": "x"}], **template)[1]
    except (RequestError, TextError):
        return None


def _files(service: Service) -> tuple[int, float]:
    """Bytes of the checkpoint's files, and when the last of them changed."""
    files = [path.stat() for path, _ in service.front.checkpoint.weight_files().values()]
    return sum(file.st_size for file in files), max((file.st_mtime for file in files), default=service.began)


async def _version(exchange: Exchange) -> Answer:
    """The version of Ollama whose fields these are: clients ask for it to know which they may use."""
    return answer({"version": API_VERSION})


async def _alive(exchange: Exchange) -> Answer:
    return Answer(b"", type="text/plain; charset=utf-8")


ROUTES = [
    *(
        Route(url, partial(_run, url), shape, broken=lambda problem: _sent(shape(problem)), body=schema(url))
        for url in (CHAT, GENERATE)
    ),
    Route("/api/tags", _tags, shape, ("GET",)),
    Route("/api/ps", _ps, shape, ("GET",)),
    Route("/api/show", _show, shape, body=body_schema(("model",), name=STRING, verbose=BOOLEAN)),
    Route("/api/version", _version, shape, ("GET",)),
    Route("/", _alive, shape, ("HEAD",), Access.FREE),
]
