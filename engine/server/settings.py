"""What a server is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ServerSettings:
    """How requests are taken in and answered.

    Attributes:
        names: of the model; the first is told, a request may name any.
        api_keys: one of which a request has to show; none: nobody is asked.
        admin_key: for routes that change the server; None: any of ``api_keys``.
        cors_origins: web pages of these origins may read answers; ``*`` for all.
        max_body_bytes: of a request.
        strict_fields: refuse fields that are not known, instead of naming them in a header of the answer.
        drain_seconds: for what runs to end after SIGTERM.
        health_seconds: without a sign of life of the engine, after which it counts as dead.
        files_dir: folder of files that clients send, and of batches over them; None for neither.
        page: show what the engine does, and a chat, to browsers.
        otel: make traces of requests, and send them where the environment says.
        template: variables of the chat template for requests that do not set them.
    """

    names: Sequence[str]
    api_keys: Sequence[str] = ()
    admin_key: str | None = None
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 32 << 20
    strict_fields: bool = False
    drain_seconds: float = 60.0
    health_seconds: float = 60.0
    files_dir: Path | None = None
    page: bool = True
    otel: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
