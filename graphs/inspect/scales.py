"""Axes: from figures to pixels, and the ticks between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """``low`` to ``high`` onto pixels ``start`` to ``stop``: straight, by the logarithm or the square root."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    root: bool = False

    def __call__(self, value: float) -> float:
        f: Callable[[float], float] = math.log if self.log else math.sqrt if self.root else float
        low, high = f(self.low), f(self.high)
        share = (f(value) - low) / (high - low) if high > low else 0.0
        return self.start + share * (self.stop - self.start)


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within ``low`` and ``high``."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**n for n in range(first, last + 1)]


def byte_ticks(high: float, *, root: bool = False) -> list[float]:
    """Round numbers of bytes from 0 to ``high``: evenly spaced, or for a square-root axis each 4 times the last."""
    if root:
        top = 2 ** math.floor(math.log2(max(high, 1.0)))
        return [0.0, *(top / 4**n for n in range(4, -1, -1) if top >= 4**n)]
    step = 2.0 ** math.ceil(math.log2(max(high, 1.0) / 6))
    return [n * step for n in range(int(high // step) + 1)]
