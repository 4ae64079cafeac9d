"""SGLang's own routes. Bodies and answers: :mod:`makeready.engine.protocol.sglang`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from makeready.engine.pieces import Piece
from makeready.engine.protocol.schema import BOOLEAN, STRING, body_schema
from makeready.engine.protocol.sglang.answer import Answers
from makeready.engine.protocol.sglang.body import read, schema
from makeready.engine.server.access import Access
from makeready.engine.server.facts import model_info, server_info
from makeready.engine.server.problem import ServeError
from makeready.engine.server.route import ALIVE, DONE, Answer, Exchange, Route, Stream, answer, event
from makeready.engine.server.routes.openai import shape
from makeready.engine.server.service import QUIET_SECONDS, Running


async def _generate(exchange: Exchange) -> Answer | Stream:
    asked = read(exchange.json())
    exchange.ignore(asked.ignored)
    rids = asked.rids or [
        exchange.id if not asked.several else f"{exchange.id}-{i}" for i in range(len(asked.asks))
    ]
    runs = await exchange.start_all(asked.asks, rids)
    answers = Answers(rids, [run.replies for run in runs], asked.texts, exchange.service.front.tokenizer)
    several = asked.several or any(run.params.n > 1 for run in runs)
    if asked.stream:
        return Stream(_events(runs, answers, several))
    made = [each for i, run in enumerate(runs) for each in answers.whole(i, await run.all())]
    return answer(made if several else made[0])


async def _events(runs: Sequence[Running], answers: Answers, several: bool) -> AsyncIterator[bytes]:
    starts, count = list[int](), 0
    for run in runs:
        starts.append(count)
        count += len(run.replies)
    async for place, pieces in _merged(runs):
        sent = b"".join(
            event({"index": starts[place] + index, **made} if several else made)
            for index, made in answers.take(place, pieces)
        )
        yield sent or ALIVE
    yield DONE


async def _merged(runs: Sequence[Running]) -> AsyncIterator[tuple[int, list[Piece]]]:
    """What becomes known of several requests, with the number of each."""
    if len(runs) == 1:
        async for pieces in runs[0].pieces():
            yield 0, pieces
        return
    streams = [run.pieces() for run in runs]
    tasks = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, timeout=QUIET_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = tasks.pop(task)
                try:
                    pieces = task.result()
                except StopAsyncIteration:
                    continue
                tasks[asyncio.ensure_future(anext(streams[place]))] = place
                yield place, pieces
    finally:
        for task in tasks:
            task.cancel()


async def _abort(exchange: Exchange) -> Answer:
    """End requests of an id, or all; their answers are what there is of them."""
    body = exchange.json()
    rid, every = body.get("rid"), body.get("abort_all") is True
    if not every and not (isinstance(rid, str) and rid):
        raise ServeError(400, 'name the request: {"rid": ...}, or {"abort_all": true}', "rid")
    exchange.service.abort(None if every else rid)
    return Answer(b"", type="text/plain")


async def _flush(exchange: Exchange) -> Answer:
    """Forget cached prefixes that no request holds."""
    pages = await exchange.service.client.flush()
    return answer({"flushed_pages": pages})


async def _model_info(exchange: Exchange) -> Answer:
    return answer(model_info(exchange.service))


async def _server_info(exchange: Exchange) -> Answer:
    return answer(server_info(exchange.service))


_GET = ("GET",)
ROUTES = [
    Route("/generate", _generate, shape, ("POST", "PUT"), body=schema()),
    Route(
        "/abort_request",
        _abort,
        shape,
        access=Access.ADMIN,
        body=body_schema((), rid=STRING, abort_all=BOOLEAN),
    ),
    Route("/flush_cache", _flush, shape, ("GET", "POST"), Access.ADMIN),
    *(Route(path, _model_info, shape, _GET) for path in ("/get_model_info", "/model_info")),
    *(Route(path, _server_info, shape, _GET) for path in ("/get_server_info", "/server_info")),
]
