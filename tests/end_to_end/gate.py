"""A gate before an engine's steps: so many are let through, and what stands still can be looked at."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from makeready.engine.llm import LLM

WAIT_SECONDS = 300  # for what is sure to come, on a machine that does much else


class Gate:
    """Stands before the steps of a model's engine from now on, until it is opened."""

    def __init__(self, llm: LLM, patch: pytest.MonkeyPatch) -> None:
        self._allowed, self._open = threading.Semaphore(0), False
        step = llm.engine.step

        def gated() -> Any:
            if not self._open:
                assert self._allowed.acquire(timeout=WAIT_SECONDS), "nobody opens the gate"
            return step()

        patch.setattr(llm.engine, "step", gated)

    def allow(self, steps: int = 1) -> None:
        """Let so many through."""
        self._allowed.release(steps)

    def open(self) -> None:
        """Let all through."""
        self._open = True
        self._allowed.release()


async def until(true: Callable[[], Any]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < end, "it does not come to that"
        await asyncio.sleep(0.001)
