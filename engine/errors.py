"""Errors that a user's request can cause."""

from __future__ import annotations


class RequestError(ValueError):
    """One request cannot be served; the message names the limit or field and the remedy."""
