"""What is done around every call: keys, and errors as gRPC has them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from makeready.engine.server.access import Access, check_access
from makeready.engine.server.problem import ServeError, problem_of
from makeready.engine.server.service import Service

_LOG = logging.getLogger("makeready.server")
LONGEST = 2000  # characters of an error: it travels as a header, and those have a limit
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}

Context = grpc.aio.ServicerContext
R = TypeVar("R")


def code_of(problem: ServeError) -> grpc.StatusCode:
    """The status of a problem."""
    other = grpc.StatusCode.INTERNAL if problem.status >= 500 else grpc.StatusCode.INVALID_ARGUMENT
    return CODES.get(problem.status, other)


def headers_of(context: Context) -> dict[str, str]:
    """What came with a call; names are in small letters, of several values of one the last counts."""
    metadata = context.invocation_metadata() or ()
    return {str(key): value for key, value in metadata if isinstance(value, str)}


async def refuse(context: Context, problem: ServeError) -> NoReturn:
    """End a call with its status; always raises."""
    trailing = ()
    if problem.retry_seconds is not None:
        # The second is what gRPC's own retries go by.
        told = (
            math.ceil(problem.retry_seconds),
            math.ceil(problem.retry_seconds * 1000),
        )
        trailing = tuple(zip(("retry-after", "grpc-retry-pushback-ms"), map(str, told), strict=True))
    await context.abort(code_of(problem), problem.message[:LONGEST], trailing)
    raise AssertionError("abort raises")


def told_of(error: Exception, what: str) -> ServeError:
    """An error as its caller is told of it; one that nobody foresaw is logged."""
    problem = problem_of(error)
    if problem.status == 500:
        _LOG.error("%s failed: %s", what, problem.message, exc_info=error)
    return problem


def call(access: Access) -> Callable[..., Callable[..., Awaitable[Any]]]:
    """A method of a servicer, for whom it is; what it raises becomes a status."""

    def made(method: Callable[[Any, Any, Context], Awaitable[R]]) -> Callable[..., Awaitable[R]]:
        @functools.wraps(method)
        async def called(self: Any, request: Any, context: Context) -> R:
            service: Service = self.service
            try:
                check_access(access, headers_of(context), service.settings)
                return await method(self, request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await refuse(context, told_of(error, method.__name__))

        return called

    return made
