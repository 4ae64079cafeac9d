"""Kernels against the target's roofline: what they move and compute, and which of the two binds them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from makeready.graphs.inspect import units
from makeready.graphs.inspect.analysis import LaunchCost
from makeready.graphs.inspect.colours import Colours
from makeready.graphs.inspect.markup import Markup, joined, svg, table, tag, text, tip
from makeready.graphs.inspect.scales import Scale, decades
from makeready.graphs.inspect.text import shape_text
from makeready.graphs.plan.targets import Target

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1200.0, 320.0, 84.0, 44.0
_BAR = 190.0


def kernel_table(kernels: Sequence[LaunchCost], colours: Colours) -> Markup:
    """One row for every kernel and weight shape, the longest first."""
    whole = math.fsum(c.seconds for c in kernels)
    longest = max((c.seconds for c in kernels), default=1.0)
    rows = []
    for c in kernels:
        name = tag(
            "span", tag("i", style=f"background:{colours.of(c.op)}"), tag("code", c.op), class_="swatch"
        )
        shape = tag("code", _weight(c), class_="dim")
        bar = svg(_BAR, 10, *_bar(c, _BAR * c.seconds / longest), label=units.percent(c.seconds / whole))
        bound = tag("span", c.bound, class_=f"bound {c.bound}")
        rows.append((
            name, shape, f"{c.launches:,}", units.nbytes(c.nbytes), units.flops(c.flops), bound,
            units.seconds(c.seconds), units.percent(c.seconds / whole), bar,
        ))  # fmt: skip
    head = ("op", "kernel, weight", "launches", "moved", "computed", "bound by", "time", "share", "")
    return table(head, rows, "<<>>><>><", class_="kernels")


def _weight(cost: LaunchCost) -> str:
    shape = "×".join(map(str, cost.weight.shape)) if cost.weight else ""
    return f"{cost.kernel} {shape}".rstrip()


def _bar(cost: LaunchCost, width: float) -> Iterator[Markup]:
    """Roofline time, its launch part last."""
    launch = width * cost.launch_seconds / cost.seconds
    kind = "compute" if cost.compute_seconds > cost.memory_seconds else "memory"
    yield tag("rect", x=0, y=1, width=width - launch, height=8, class_=f"part {kind}")
    yield tag("rect", x=width - launch, y=1, width=launch, height=8, class_="part launch")


def roofline_picture(kernels: Sequence[LaunchCost], target: Target, colours: Colours) -> Markup:
    """Operations a second against operations a byte, both by the logarithm; area grows with the time taken.

    Points reach the roof but for the cost of their launches. Kernels that compute nothing have no place.
    """
    points = [c for c in kernels if c.flops and c.nbytes]
    if not points:
        return tag("p", "No kernel computes anything.", class_="note")
    peaks = sorted({round(c.flops / c.compute_seconds) for c in points})
    ridge = peaks[-1] / target.bandwidth
    low = 10 ** math.floor(math.log10(min(c.flops / c.nbytes for c in points)) - 0.1)
    high = 10 ** math.ceil(math.log10(max(ridge * 2, *(c.flops / c.nbytes for c in points))) + 0.1)
    slowest = min(c.flops / c.seconds for c in points)
    x = Scale(low, high, _LEFT, _WIDTH - 12, log=True)
    y = Scale(10 ** math.floor(math.log10(slowest) - 0.1), peaks[-1] * 2.5, _HEIGHT, 12, log=True)
    parts = [*_axes(x, y), *_roofs(peaks, target, x, y)]
    longest = max(c.seconds for c in points)
    parts += [_point(c, longest, x, y, colours) for c in points]
    return svg(_WIDTH, _HEIGHT + _BOTTOM, joined(parts), label="roofline of the target and its kernels")


def _axes(x: Scale, y: Scale) -> Iterator[Markup]:
    for value in decades(x.low, x.high):
        yield tag("line", x1=x(value), x2=x(value), y1=y.start, y2=y.stop, class_="grid")
        yield text(x(value), y.start + 16, f"{value:g}", class_="tick", text_anchor="middle")
    for value in decades(y.low, y.high):
        yield tag("line", x1=x.start, x2=x.stop, y1=y(value), y2=y(value), class_="grid")
        yield text(x.start - 8, y(value) + 4, units.rate(value, "FLOP"), class_="tick", text_anchor="end")
    yield text(
        (x.start + x.stop) / 2, y.start + 36, "FLOP per byte moved", class_="axis", text_anchor="middle"
    )


def _roofs(peaks: Sequence[float], target: Target, x: Scale, y: Scale) -> Iterator[Markup]:
    for peak in peaks:
        ridge = peak / target.bandwidth
        first = max(x.low, y.low / target.bandwidth)
        d = (
            f"M{x(first):.1f} {y(first * target.bandwidth):.1f}"
            f"L{x(ridge):.1f} {y(peak):.1f}L{x(x.high):.1f} {y(peak):.1f}"
        )
        yield tag("path", d=d, class_="roof")
        dtypes = ", ".join(units.dtype(d) for d, rate in target.flops.items() if round(rate) == peak)
        name = f"{units.rate(peak, 'FLOP')} {dtypes}"
        yield text(x.stop - 4, y(peak) - 6, name, class_="tick", text_anchor="end")
    start = max(x.low, y.low / target.bandwidth) * 1.5
    slope = math.degrees(math.atan2(y(10) - y(1), x(10) - x(1)))
    place = f"translate({x(start):.1f} {y(start * target.bandwidth) - 7:.1f}) rotate({slope:.1f})"
    yield tag("text", units.rate(target.bandwidth, "B"), transform=place, class_="tick")


def _point(cost: LaunchCost, longest: float, x: Scale, y: Scale, colours: Colours) -> Markup:
    at, up = x(cost.flops / cost.nbytes), y(cost.flops / cost.seconds)
    size = 4 + 10 * math.sqrt(cost.seconds / longest)
    content = tip(
        f"{cost.op}/{cost.kernel}",
        [
            *([("weight", shape_text(cost.weight))] if cost.weight else []),
            ("launches", f"{cost.launches:,}"),
            ("moved", units.nbytes(cost.nbytes)),
            ("computed", units.flops(cost.flops)),
            ("intensity", f"{units.digits(cost.flops / cost.nbytes)} FLOP/B"),
            ("reaches", units.rate(cost.flops / cost.seconds, "FLOP")),
            ("time", f"{units.seconds(cost.seconds)}, {cost.bound}-bound"),
        ],
    )
    look = {"fill": colours.of(cost.op), "class_": "point", "data_tip": content}
    if cost.bound == "compute":
        half = size * 0.89  # the same area as the circle
        return tag("rect", x=at - half, y=up - half, width=2 * half, height=2 * half, **look)
    if cost.bound == "launch":
        wide = size * 1.2
        return tag(
            "path", d=f"M{at:.1f} {up - wide:.1f}l{wide:.1f} {wide * 1.7:.1f}h{-2 * wide:.1f}z", **look
        )
    return tag("circle", cx=at, cy=up, r=size, **look)
