"""A fact that a plan must satisfy, and what is raised where it does not."""

from __future__ import annotations

MOST = 2**31 - 1  # of anything that a kernel counts in int32


class ContradictionError(Exception):
    """What is wrong, as a clause that begins with the place; never leaves graphs/plan/check.py."""


def need(holds: bool, complaint: str) -> None:
    """Raise :class:`ContradictionError` unless ``holds``."""
    if not holds:
        raise ContradictionError(complaint)


def inside(offset: int, nbytes: int, region: int) -> bool:
    """Whether bytes ``offset: offset + nbytes`` lie in a region of so many."""
    return min(offset, nbytes) >= 0 and offset + nbytes <= region
