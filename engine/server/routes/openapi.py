"""``/openapi.json``: all routes and what their bodies may say, for clients that are generated and servers' tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from makeready.engine.server.access import Access
from makeready.engine.server.route import IGNORED, JSON, REQUEST_ID, Answer, Exchange, Route, answer
from makeready.engine.server.routes.openai import shape

VERSION = "3.1.0"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI's description of routes. Source: https://spec.openapis.org/oas/v3.1.0."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        described = paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})
        for method in route.methods:
            described[method.lower()] = _operation(route, method)
    return {
        "openapi": VERSION,
        "info": {"title": "makeready", "version": version("makeready")},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    endpoint = route.endpoint
    endpoint = endpoint.func if isinstance(endpoint, partial) else endpoint
    headers = {name: {"schema": {"type": "string"}} for name in (REQUEST_ID, IGNORED)}
    kinds = [JSON]
    if route.body is not None and "stream" in route.body.get("properties", {}):
        kinds.append("text/event-stream")
    made: dict[str, Any] = {
        "operationId": f"{method.lower()} {route.path}",
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": headers,
                "content": {kind: {} for kind in kinds},
            },
            "default": {"description": "Why there is none.", "headers": headers, "content": {JSON: {}}},
        },
    }
    if endpoint.__doc__:
        made["summary"] = " ".join(endpoint.__doc__.split())
    if names := _PARAMETER.findall(route.path):
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if route.body is not None and method in ("POST", "PUT"):
        made["requestBody"] = {"required": True, "content": {route.takes: {"schema": route.body}}}
    if route.access is not Access.FREE:
        made["security"] = [{"key": []}]
    return made


async def _openapi(exchange: Exchange) -> Answer:
    """This description."""
    from makeready.engine.server.routes import all_routes

    return answer(document(all_routes()))


ROUTES: list[Route] = [Route("/openapi.json", _openapi, shape, ("GET",))]
