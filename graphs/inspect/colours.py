"""One colour an op all over the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from makeready.graphs.inspect.analysis import LaunchCost, by_kernel
from makeready.graphs.inspect.markup import Markup, joined, tag

COUNT = 16  # of the --c variables in assets.py


class Colours:
    """Colours by op, the ops that take longest first; a phase's variant of an op has the op's colour."""

    def __init__(self, launches: Mapping[str, Iterable[LaunchCost]]) -> None:
        """``launches`` are those of every phase, by its name."""
        self._phases = tuple(launches)
        self._index: dict[str, int] = {}
        for costs in launches.values():
            for cost in by_kernel(costs):
                self._index.setdefault(self._family(cost.op), len(self._index))

    def of(self, op: str) -> str:
        """A CSS colour."""
        return f"var(--c{self._index[self._family(op)] % COUNT})"

    def legend(self, ops: Iterable[str]) -> Markup:
        """Swatch and name of each op, in the colours' order."""
        ordered = sorted(set(ops), key=lambda op: self._index[self._family(op)])
        items = (tag("span", tag("i", style=f"background:{self.of(op)}"), op) for op in ordered)
        return tag("div", joined(items), class_="legend")

    def _family(self, op: str) -> str:
        for phase in self._phases:
            op = op.removeprefix(f"{phase}_")
        return op
