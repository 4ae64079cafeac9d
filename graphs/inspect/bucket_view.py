"""Buckets: a table with padding as bars, and which bucket runs which batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from makeready.graphs.inspect import units
from makeready.graphs.inspect.analysis import largest_bucket
from makeready.graphs.inspect.markup import Markup, joined, svg, table, tag, text, tip
from makeready.graphs.inspect.padding import Cell, Padding, Share, Waste
from makeready.graphs.inspect.scales import Scale
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import Bucket

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1200.0, 250.0, 74.0, 40.0
_BAR = 74.0


def bucket_table(phase: str, costs: Mapping[Bucket, Mapping[str, float]], padding: Padding) -> Markup:
    """Every bucket of a phase, and all of them together in the last row."""
    rows = []
    for bucket, cost in costs.items():
        if bucket.phase == phase:
            w = padding.buckets[bucket]
            step = (units.seconds(cost["seconds"]), units.digits(cost["tokens_per_second"]))
            rows.append(_row(str(bucket), w, units.percent(w.weight), *step))
    rows.append(_row(f"all {phase}", padding.phases[phase], "", "", ""))
    head = (
        "bucket",
        "rows",
        "tokens",
        "batches",
        "of steps",
        "step time",
        "tokens/s",
        "padded tokens: expected, worst",
        "padded time: expected, worst",
    )
    return table(head, rows, "<>>>>>><<", class_="buckets")


def _row(name: str, waste: Waste, weight: str, seconds: str, rate: str) -> tuple[str, ...]:
    label = tag("code", name)
    batches = (units.span(*waste.rows), units.span(*waste.tokens), f"{waste.batches:,}")
    return (label, *batches, weight, seconds, rate, _bar(waste.token), _bar(waste.time))


def _bar(share: Share) -> Markup:
    """Expected padding as a bar, the worst case as a line, both as figures."""
    worst, expected = share.worst or 0.0, share.expected or 0.0
    drawn = svg(
        _BAR, 10,
        tag("rect", x=0, y=1, width=_BAR, height=8, class_="track"),
        tag("rect", x=0, y=1, width=expected * _BAR, height=8, class_="filled"),
        tag("line", x1=worst * _BAR, x2=worst * _BAR, y1=0, y2=10, class_="worst"),
        label=f"expected {units.percent(share.expected)}, worst {units.percent(share.worst)}",
    )  # fmt: skip
    figures = (
        tag("span", units.percent(share.expected), class_="n"),
        tag("span", units.percent(share.worst), class_="n dim"),
    )
    return tag("div", drawn, *figures, class_="waste")


def bucket_map(plan: Plan, phase: str, padding: Padding) -> Markup:
    """Rows against tokens: a field a group of the phase's batches with one bucket, darker for more padding.

    A size n takes the strip from n - 1/2 to n + 1/2 of a logarithmic axis.
    """
    rows, tokens = plan.limits.max_rows, largest_bucket(plan, phase).tokens
    x = Scale(0.5, tokens + 0.5, _LEFT, _WIDTH - 4, log=True)
    y = Scale(0.5, rows + 0.5, _HEIGHT, 8, log=True)
    parts = [tag("rect", x=x.start, y=8, width=x.stop - x.start, height=_HEIGHT - 8, class_="illegal")]
    found = padding.cells[phase]
    for cell, waste in found:
        parts.append(_field(cell, waste, x, y))
    parts.append(_illegal(rows, tokens, x, y))
    for value in sorted({1, *(c.tokens[1] for c, _ in found)}):
        parts.append(text(x(value), _HEIGHT + 16, f"{value:,}", class_="tick", text_anchor="middle"))
    for value in sorted({1, *(c.rows[1] for c, _ in found)}):
        parts.append(text(x.start - 8, y(value) + 4, f"{value:,}", class_="tick", text_anchor="end"))
    parts.append(
        text((x.start + x.stop) / 2, _HEIGHT + 34, "tokens of the step", class_="axis", text_anchor="middle")
    )
    parts.append(
        tag(
            "text",
            "rows",
            transform=f"translate(20 {_HEIGHT / 2 + 4:.0f}) rotate(-90)",
            class_="axis",
            text_anchor="middle",
        )
    )
    return svg(_WIDTH, _HEIGHT + _BOTTOM, joined(parts), label=f"which {phase} bucket runs which batch")


def _field(cell: Cell, waste: Waste, x: Scale, y: Scale) -> Markup:
    left, right = x(cell.tokens[0] - 0.5), x(cell.tokens[1] + 0.5)
    low, high = y(cell.rows[0] - 0.5), y(cell.rows[1] + 0.5)
    expected = waste.token.expected if waste.token.expected is not None else waste.token.worst or 0.0
    content = tip(
        str(cell.bucket),
        [
            ("rows", units.span(*waste.rows)),
            ("tokens", units.span(*waste.tokens)),
            ("batches", f"{waste.batches:,}, {units.percent(waste.weight)} of steps"),
            (
                "padded tokens",
                f"{units.percent(waste.token.expected)}, at worst {units.percent(waste.token.worst)}",
            ),
            (
                "padded time",
                f"{units.percent(waste.time.expected)}, at worst {units.percent(waste.time.worst)}",
            ),
        ],
    )
    parts = [
        tag("rect", x=left, y=high, width=right - left, height=low - high, class_="ground"),
        tag(
            "rect", x=left, y=high, width=right - left, height=low - high,
            fill_opacity=f"{0.06 + 0.8 * math.sqrt(expected):.2f}", class_="cell",
        ),
    ]  # fmt: skip
    label = f"{cell.bucket.rows}×{cell.bucket.tokens}"
    if right - left > 6.6 * len(label) + 8 and low - high > 16:
        parts.append(
            text((left + right) / 2, (low + high) / 2 + 4, label, class_="mono onfield", text_anchor="middle")
        )
    return tag("g", *parts, data_tip=content)


def _illegal(rows: int, tokens: int, x: Scale, y: Scale) -> Markup:
    """Stairs over the batches with fewer tokens than rows, which cannot be."""
    if rows == 1:
        return Markup("")
    d = [f"M{x(0.5):.1f} {y(1.5):.1f}"]
    for n in range(1, min(rows, tokens)):
        d.append(f"H{x(n + 0.5):.1f}V{y(min(n + 1.5, rows + 0.5)):.1f}")
    d.append(f"H{x(0.5):.1f}Z")
    return tag(
        "path", d="".join(d), class_="illegal", data_tip=tip("no such batch: a row has at least one token")
    )
