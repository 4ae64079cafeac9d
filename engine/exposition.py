"""Counters, gauges and histograms, and how Prometheus reads them.

The text is version 0.0.4 of the exposition format
(https://prometheus.io/docs/instrumenting/exposition_formats). Written by hand, since it is a page of code,
and a counter then costs a step a dictionary lookup and no lock: one thread, the engine's, writes; any
thread may render.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TypeAlias

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels: TypeAlias = tuple[str, ...]
"""Values of a family's labels, in the order of their names."""


class Family:
    """Samples of one name that differ in their labels.

    Args:
        name: of the metric; counters end in ``_total``, others in their unit.
        help: what it counts.
        labels: names of labels.
    """

    kind = ""

    def __init__(self, name: str, help: str, labels: Labels = ()) -> None:
        self.name, self.help, self.labels = name, help, labels

    def lines(self) -> Iterator[str]:
        """The family as lines of text, without samples if it has none yet."""
        text = self.help.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {self.name} {text}"
        yield f"# TYPE {self.name} {self.kind}"
        yield from self._samples()

    def _samples(self) -> Iterator[str]:
        raise NotImplementedError

    def _line(self, suffix: str, labels: Labels, value: float, *more: tuple[str, str]) -> str:
        pairs = [f'{name}="{_escaped(one)}"' for name, one in [*zip(self.labels, labels, strict=True), *more]]
        return f"{self.name}{suffix}{'{' + ','.join(pairs) + '}' if pairs else ''} {_number(value)}"


class _Number(Family):
    def __init__(self, name: str, help: str, labels: Labels = ()) -> None:
        super().__init__(name, help, labels)
        self._values: dict[Labels, float] = {} if labels else {(): 0.0}

    def _samples(self) -> Iterator[str]:
        for labels, value in list(self._values.items()):
            yield self._line("", labels, value)


class Counter(_Number):
    """A number that only grows."""

    kind = "counter"

    def add(self, amount: float, labels: Labels = ()) -> None:
        """Add ``amount``, at least 0."""
        self._values[labels] = self._values.get(labels, 0.0) + amount


class Gauge(_Number):
    """A number that goes up and down."""

    kind = "gauge"

    def set(self, value: float, labels: Labels = ()) -> None:
        """Replace the value."""
        self._values[labels] = value


class Histogram(Family):
    """How many observations were at most as large as each of ``bounds``, which ascend."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Labels = ()) -> None:
        super().__init__(name, help, labels)
        self.bounds = tuple(bounds)
        self._sums: dict[Labels, float] = {}
        self._counts: dict[Labels, list[int]] = {}
        if not labels:
            self.observe(0.0, 0)

    def observe(self, value: float, count: int = 1, labels: Labels = ()) -> None:
        """Count ``value`` so many times."""
        if labels not in self._counts:
            self._sums[labels], self._counts[labels] = 0.0, [0] * (len(self.bounds) + 1)
        self._sums[labels] += value * count
        self._counts[labels][bisect_left(self.bounds, value)] += count

    def _samples(self) -> Iterator[str]:
        for labels, counts in list(self._counts.items()):
            below = 0
            for bound, count in zip((*self.bounds, math.inf), list(counts), strict=True):
                below += count
                yield self._line("_bucket", labels, below, ("le", _number(bound)))
            yield self._line("_sum", labels, self._sums[labels])
            yield self._line("_count", labels, below)


def render(families: Sequence[Family]) -> str:
    """The text that a scrape gets."""
    return "\n".join([line for family in families for line in family.lines()]) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))
