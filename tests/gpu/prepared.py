"""Kernels of a file's tests, compiled at once where that is worth it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from benchmarks.gpu import launcher

from makeready.kernels.device import Candidate, OpCall


def prepare(work: Iterable[tuple[OpCall, Sequence[Candidate]]]) -> None:
    """On all cores; not in one of several workers, each of which would compile what the others' tests need.

    Give an iterator where finding the work compiles something.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        launcher.prepare(work)
