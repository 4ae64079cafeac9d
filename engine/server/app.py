"""All routes as an ASGI application, and what holds for every request: its id, web pages that ask, unknown paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as AsgiRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from makeready.engine.server.problem import ServeError
from makeready.engine.server.route import IGNORED, JSON, REQUEST_ID, Route, Served, identity_of
from makeready.engine.server.routes import all_routes
from makeready.engine.server.routes.openai import shape
from makeready.engine.server.service import Service


def make_app(service: Service, routes: Sequence[Route] | None = None) -> ASGIApp:
    """The application.

    Args:
        routes: those of all protocols where none are given.
    """
    settings = service.settings
    middleware = [Middleware(Identified), Middleware(Pages, origins=settings.cors_origins)]
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=[REQUEST_ID, IGNORED, "retry-after"],
            )
        )
    return Starlette(
        routes=[
            AsgiRoute(route.path, Served(route, service), methods=list(route.methods))
            for route in (all_routes() if routes is None else routes)
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _unknown},
    )


async def _unknown(request: Request, error: Any) -> Response:
    """A path or a method that no route has."""
    said = {
        404: f"there is nothing at {request.url.path[:200]}",
        405: f"{request.url.path[:200]} does not take {request.method[:20]}",
    }
    problem = ServeError(error.status_code, said.get(error.status_code, str(error.detail)))
    body = msgspec.json.encode(shape(problem))
    return Response(body, error.status_code, dict(error.headers or {}), JSON)


class Identified:
    """Gives every request an id, the client's where it has one, and repeats it in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = identity_of(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = identity

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = identity
            await send(message)

        await self._app(scope, receive, identified)


class Pages:
    """Refuses what a web page of another origin sends, unless it may: browsers send some requests without asking."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            allowed = origin is None or self._origins & {origin, "*"}
            if not allowed and urlsplit(origin or "").netloc != headers.get("host"):
                problem = ServeError(403, f"pages of {origin} may not ask; see the option cors_origins")
                response = Response(msgspec.json.encode(shape(problem)), 403, media_type=JSON)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
