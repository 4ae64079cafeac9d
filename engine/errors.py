"""Errors that a user's request can cause."""

from __future__ import annotations


class RequestError(ValueError):
    """One request cannot be served; the message names the limit or field and the remedy."""


class BusyError(RequestError):
    """It could be served, but not now: as many wait as may."""


def reason_of(error: BaseException, work: str) -> str:
    """A sentence for what was raised by one request's own work; it ends that request and no other.

    Args:
        error: whatever it was. What ends a process (an interruption) is raised again.
        work: what was being done, where the error is none of ours with a sentence of its own.
    """
    if isinstance(error, ValueError) and type(error).__module__.startswith("makeready."):
        return str(error)
    # A panic of a library in Rust is no Exception, though it leaves the process as it was.
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return f"{work} ({type(error).__name__}: {error})"
    raise error
