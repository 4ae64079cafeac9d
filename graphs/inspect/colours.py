"""One colour an op all over the page."""

from __future__ import annotations

from collections.abc import Iterable

from makeready.graphs.inspect.analysis import LaunchCost, by_kernel
from makeready.graphs.inspect.markup import Markup, joined, tag
from makeready.graphs.spec import PHASES

COUNT = 16  # of the --c variables in assets.py


class Colours:
    """Colours by op, the ops that take longest first; a phase's variant of an op has the op's colour."""

    def __init__(self, phases: Iterable[Iterable[LaunchCost]]) -> None:
        self._index: dict[str, int] = {}
        for costs in phases:
            for cost in by_kernel(costs):
                self._index.setdefault(_family(cost.op), len(self._index))

    def of(self, op: str) -> str:
        """A CSS colour."""
        return f"var(--c{self._index[_family(op)] % COUNT})"

    def legend(self, ops: Iterable[str]) -> Markup:
        """Swatch and name of each op, in the colours' order."""
        ordered = sorted(set(ops), key=lambda op: self._index[_family(op)])
        items = (tag("span", tag("i", style=f"background:{self.of(op)}"), op) for op in ordered)
        return tag("div", joined(items), class_="legend")


def _family(op: str) -> str:
    for phase in PHASES:
        op = op.removeprefix(f"{phase}_")
    return op
