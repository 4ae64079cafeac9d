"""What goes wrong with a request, with its HTTP status."""

from __future__ import annotations

import math
from dataclasses import dataclass

from makeready.engine.errors import reason_of
from makeready.engine.protocol.asked import AskError
from makeready.engine.remote.client import EngineGoneError, UnavailableError

STARTING_SECONDS = 5  # after which a server that is restarted may be asked again


@dataclass
class ServeError(Exception):
    """Why there is no answer.

    Attributes:
        status: of HTTP.
        message: a sentence with the remedy.
        field: of the body that it is about, where it is one.
        code: a word for programs, where OpenAI has one.
        retry_seconds: after which the same request may be served.
    """

    status: int
    message: str
    field: str | None = None
    code: str | None = None
    retry_seconds: float | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """That go with it."""
        made = {}
        if self.retry_seconds is not None:
            made["retry-after"] = str(math.ceil(self.retry_seconds))
        if self.status == 401:
            made["www-authenticate"] = "Bearer"
        return made


def problem_of(error: BaseException) -> ServeError:
    """An error as its request is told of it; what nobody foresaw is 500."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, AskError):
        return ServeError(400, str(error), error.field)
    if isinstance(error, UnavailableError):
        return ServeError(429, str(error), code="rate_limit_exceeded", retry_seconds=error.retry_seconds)
    if isinstance(error, EngineGoneError):
        return ServeError(503, str(error), retry_seconds=STARTING_SECONDS)
    message = reason_of(error, "the request cannot be answered")
    foreseen = isinstance(error, ValueError) and type(error).__module__.startswith("makeready.")
    return ServeError(400 if foreseen else 500, message)
