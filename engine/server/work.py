"""What the engine does for somebody who asks, whatever protocol that is in; its end, and its trace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from makeready.engine.protocol.asked import Ask
from makeready.engine.server.problem import ServeError
from makeready.engine.server.service import Running, Service, check_samples


@dataclass
class Work:
    """What is asked for at once; closed in the end by whoever made it.

    Attributes:
        id: the client's name for it, or ours.
        headers: what came with it, by names in small letters; among them may be its client's trace.
        running: what the engine does for it.
        asks: what the engine was asked for, refused or not.
        streams: whether the answer is one.
        problem: what went wrong with it.
        began: seconds of ``time.perf_counter``.
    """

    service: Service
    id: str
    headers: Mapping[str, str]
    running: list[Running] = field(default_factory=list, kw_only=True)
    asks: list[Ask] = field(default_factory=list, kw_only=True)
    streams: bool = field(default=False, kw_only=True)
    problem: ServeError | None = field(default=None, kw_only=True)
    began: float = field(default_factory=time.perf_counter, kw_only=True)

    async def start(self, ask: Ask, identity: str | None = None) -> Running:
        """Have the engine run what is asked for, until this is closed; see :meth:`Service.start`."""
        self.asks.append(ask)
        running = await self.service.start(ask, identity or self.id)
        self.running.append(running)
        return running

    async def start_all(self, asks: Sequence[Ask], identities: Sequence[str]) -> list[Running]:
        """The same for several at once; where one is refused none runs on."""
        check_samples(len(asks))
        started = (self.start(ask, identity) for ask, identity in zip(asks, identities, strict=True))
        made = await asyncio.gather(*started, return_exceptions=True)
        for each in made:
            if isinstance(each, BaseException):
                raise each
        return [each for each in made if isinstance(each, Running)]

    def close(self, told: Mapping[str, Any], *, served: bool = True) -> None:
        """End what still runs, and make its trace where the engine was asked for something.

        Args:
            told: attributes of the trace that are its protocol's.
            served: a client waits for it.
        """
        if self.asks and self.service.tracing is not None:
            self.service.tracing.ended(self, told, served=served)  # pyright: ignore[reportArgumentType]
        for running in self.running:
            self.service.end(running)
