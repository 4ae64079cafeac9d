"""Steps and their floors as a picture: two bars a bucket, cut where one kind of launch ends and the next begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from makeready.graphs.inspect import units
from makeready.graphs.inspect.markup import Markup, joined, tag, text

_LEFT, _WIDTH, _RIGHT = 170, 640, 90  # pixels: names, bars, milliseconds
_BAR, _FLOOR, _ROW = 22, 10, 52  # heights
_SMALL = 0.02  # of every step, below which a kind of launch is one of the others
_COLOURS = ("#4e79a7", "#76b7b2", "#59a14f", "#edc948", "#f28e2b", "#e15759", "#b07aa1", "#9c755f")
_OTHERS = "#9aa3b2"
_STYLE = (
    ".n{font-size:13px;fill:#1d2430}.s{font-size:12px;fill:#6b7588}.g{fill:#fff;stroke:#fff;stroke-width:.6}"
    "@media (prefers-color-scheme:dark){.n{fill:#e8ecf2}.s{fill:#8a94a6}}"
)


def picture(steps: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of what ``buckets`` found; each bucket at a scale of its own, since steps differ forty times in length.

    The upper bar is the step, the lower one, thinner, its floor.
    """
    kinds = _kinds(steps)
    colours = dict(zip(kinds, _COLOURS, strict=False))
    rows = [_row(step, colours, 8 + _ROW * at) for at, step in enumerate(steps)]
    legend, height = _legend(colours, 8 + _ROW * len(steps) + 8)
    return tag(
        "svg", tag("style", Markup(_STYLE)), *rows, legend,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_LEFT + _WIDTH + _RIGHT} {height}",
        font_family="system-ui, sans-serif", role="img",
        aria_label="Steps of some buckets cut into kinds of kernels, each above its floor",
    )  # fmt: skip


def _kind(part: Mapping[str, Any]) -> str:
    if "linear" not in part["op"]:
        return str(part["op"]).removeprefix("decode_").removeprefix("extend_")
    return f"{part['op']} {part['weight'][0]}x{part['weight'][1]}"


def _kinds(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Kinds of launches that are worth a colour, those with the greatest share of all steps first."""
    shares: dict[str, list[float]] = {}
    for step in steps:
        for kind, seconds in _sums(step, "seconds").items():
            shares.setdefault(kind, []).append(seconds / step["seconds"])
    large = [kind for kind, found in shares.items() if max(found) >= _SMALL]
    return sorted(large, key=lambda kind: -sum(shares[kind]))[: len(_COLOURS)]


def _sums(step: Mapping[str, Any], figure: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in step["parts"]:
        found[_kind(part)] = found.get(_kind(part), 0.0) + part[figure]
    return found


def _row(step: Mapping[str, Any], colours: Mapping[str, str], y: int) -> Markup:
    name, whole = str(step["bucket"]), max(step["seconds"], step["floor"])
    scale, ends = _WIDTH / whole, _LEFT + _WIDTH + 8
    return joined(
        [
            text(_LEFT - 10, y + 16, name, class_="n", text_anchor="end"),
            _bar(_sums(step, "seconds"), colours, y, _BAR, scale),
            text(ends, y + 16, units.seconds(step["seconds"]), class_="n"),
            _bar(_sums(step, "floor"), colours, y + _BAR + 2, _FLOOR, scale),
            text(ends, y + _BAR + 12, units.seconds(step["floor"]), class_="s"),
        ]
    )


def _bar(sums: Mapping[str, float], colours: Mapping[str, str], y: int, height: int, scale: float) -> Markup:
    kept = {kind: sums.get(kind, 0.0) for kind in colours}
    kept["others"] = sum(sums.values()) - sum(kept.values())
    ends = accumulate(kept.values(), initial=0.0)
    return joined(
        tag(
            "rect", tag("title", f"{kind}: {units.seconds(stop - start)}"), class_="g",
            x=_LEFT + scale * start, y=y, width=scale * (stop - start), height=height,
            style=f"fill:{colours.get(kind, _OTHERS)}",
        )
        for kind, (start, stop) in zip(kept, pairwise(ends), strict=True)
    )  # fmt: skip


def _legend(colours: Mapping[str, str], y: int) -> tuple[Markup, int]:
    """Names beside their colours, and where the picture ends."""
    named = [*colours.items(), ("others", _OTHERS)]
    columns, width = 3, (_LEFT + _WIDTH + _RIGHT) / 3
    items = []
    for at, (kind, colour) in enumerate(named):
        x, top = 16 + width * (at % columns), y + 20 * (at // columns)
        items.append(tag("rect", x=x, y=top, width=12, height=12, rx=2, style=f"fill:{colour}"))
        items.append(text(x + 18, top + 11, kind, class_="s"))
    return joined(items), y + 20 * -(-len(named) // columns) + 8
