"""The page at ``/``: a chat beside what the engine does; and the stream that it shows.

What it consists of is built by ``make page`` from ``engine/server/page`` and lies in ``engine/server/page/built``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import cache
from pathlib import Path

from makeready.engine.server.access import Access
from makeready.engine.server.problem import ServeError
from makeready.engine.server.route import Answer, Exchange, Route, Stream, event
from makeready.engine.server.routes.openai import shape

BUILT = Path(__file__).parents[1] / "page" / "built"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css"}
# Text of a model is in this page: it can load nothing from elsewhere, run no script of its own, send nothing away.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types dompurify"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
FOREVER = "public, max-age=31536000, immutable"  # the page names its files with their digests


async def _page(exchange: Exchange) -> Answer:
    return _file(exchange, "index.html", "no-cache")


async def _part(exchange: Exchange) -> Answer:
    return _file(exchange, exchange.path["name"], FOREVER)


def _file(exchange: Exchange, name: str, keep: str) -> Answer:
    _check(exchange)
    body = _built().get(name)
    if body is None:
        raise ServeError(404, f"there is nothing at /page/{name[:200]}")
    exchange.answer_headers |= {**HEADERS, "cache-control": keep}
    return Answer(body, type=TYPES[Path(name).suffix])


@cache
def _built() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in BUILT.iterdir() if path.suffix in TYPES}


def _check(exchange: Exchange) -> None:
    if not exchange.service.settings.page:
        raise ServeError(404, "there is no page here; start the server with page=true")


async def _live(exchange: Exchange) -> Stream:
    _check(exchange)
    return Stream(_events(exchange))


async def _events(exchange: Exchange) -> AsyncIterator[bytes]:
    async with aclosing(exchange.service.live.events()) as told:
        async for each in told:
            yield event(each)


ROUTES = [
    Route("/", _page, shape, ("GET",), Access.FREE),
    Route("/page/{name}", _part, shape, ("GET",), Access.FREE),
    Route("/live", _live, shape, ("GET",)),
]
