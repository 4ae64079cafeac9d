"""Counters, gauges and histograms of one thread, and how Prometheus reads them.

The text is written by prometheus_client. Counting is not: these cost a step a dictionary lookup and no lock, and take
an observation that stands for many. One thread writes; any may render.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

Labels: TypeAlias = tuple[str, ...]
"""Values of a family's labels, in the order of their names."""


class Family:
    """Samples of one name that differ in their labels.

    Args:
        name: of the metric; counters end in ``_total``, others in their unit.
        help: what it counts.
        labels: names of labels.
    """

    def __init__(self, name: str, help: str, labels: Labels = ()) -> None:
        self.name, self.help, self.labels = name, help, labels

    def metric(self, name: str | None = None, fixed: Sequence[tuple[str, str]] = ()) -> Metric:
        """The family as prometheus_client has it, perhaps by another name and with further labels."""
        raise NotImplementedError


class _Number(Family):
    def __init__(self, name: str, help: str, labels: Labels = ()) -> None:
        super().__init__(name, help, labels)
        self._values: dict[Labels, float] = {} if labels else {(): 0.0}

    def value(self, labels: Labels = ()) -> float:
        """The number now."""
        return self._values.get(labels, 0.0)

    def items(self) -> list[tuple[Labels, float]]:
        """All numbers now, by their labels."""
        return list(self._values.items())

    def metric(self, name: str | None = None, fixed: Sequence[tuple[str, str]] = ()) -> Metric:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        make = CounterMetricFamily if isinstance(self, Counter) else GaugeMetricFamily
        made = make(name or self.name, self.help, labels=[*(key for key, _ in fixed), *self.labels])
        for labels, value in self.items():
            made.add_metric([*(text for _, text in fixed), *labels], value)
        return made


class Counter(_Number):
    """A number that only grows."""

    def add(self, amount: float, labels: Labels = ()) -> None:
        """Add ``amount``, at least 0."""
        self._values[labels] = self._values.get(labels, 0.0) + amount


class Gauge(_Number):
    """A number that goes up and down."""

    def set(self, value: float, labels: Labels = ()) -> None:
        """Replace the value."""
        self._values[labels] = value


class Histogram(Family):
    """How many observations were at most as large as each of ``bounds``, which ascend."""

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

    def counts(self, labels: Labels = ()) -> list[int]:
        """Observations by bucket: above the bound before, up to this one; those above all bounds are the last."""
        return list(self._counts.get(labels, [0] * (len(self.bounds) + 1)))

    def metric(self, name: str | None = None, fixed: Sequence[tuple[str, str]] = ()) -> Metric:
        from prometheus_client.core import HistogramMetricFamily
        from prometheus_client.utils import floatToGoString

        made = HistogramMetricFamily(
            name or self.name, self.help, labels=[*(key for key, _ in fixed), *self.labels]
        )
        for labels, counts in list(self._counts.items()):
            below, buckets = 0, list[tuple[str, float]]()
            for bound, count in zip((*self.bounds, math.inf), list(counts), strict=True):
                below += count
                buckets.append((floatToGoString(bound), below))
            made.add_metric([*(text for _, text in fixed), *labels], buckets, self._sums[labels])
        return made


def render(metrics: Iterable[Metric], accept: str = "") -> tuple[bytes, str]:
    """What a scrape gets, and its type.

    Args:
        accept: what the scraper says that it reads; the classic text where it says nothing.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    class All:
        def collect(self) -> Iterator[Metric]:
            yield from metrics

    registry = CollectorRegistry()
    registry.register(All())  # type: ignore[arg-type]
    encode, kind = choose_encoder(accept)
    return encode(registry), kind
