"""HTML and SVG built so that nothing escapes escaping: plain strings are text, :class:`Markup` is markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_VOID = frozenset({"meta", "br", "hr", "input", "path", "rect", "line", "circle"})


class Markup(str):
    """Text that is markup already. Only this module makes it from parts; constants may be wrapped."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """``<name attributes>children</name>``; children that are not :class:`Markup` are escaped.

    Attribute names lose a trailing ``_`` and get ``-`` for ``_``; ``None`` and ``False`` leave one out,
    ``True`` writes it bare. Floats keep one decimal: a tenth of a pixel.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {key}")
        elif value is not None and value is not False:
            parts.append(f' {key}="{escape(_number(value), quote=True)}"')
    inside = "".join(c if isinstance(c, Markup) else escape(c, quote=True) for c in children)
    if name in _VOID and not inside:
        return Markup("".join(parts) + "/>")
    return Markup("".join(parts) + f">{inside}</{name}>")


def joined(parts: Iterable[Markup]) -> Markup:
    """Pieces of markup one after the other."""
    return Markup("".join(parts))


def svg(width: float, height: float, *children: Markup, label: str) -> Markup:
    """An inline picture that shrinks with the page; ``label`` says what it shows to those who cannot see it."""
    return tag(
        "svg", *children,
        viewBox=f"0 0 {width:.0f} {height:.0f}", width=f"{width:.0f}", height=f"{height:.0f}",
        role="img", aria_label=label,
    )  # fmt: skip


def text(x: float, y: float, content: str, **attributes: object) -> Markup:
    """SVG text with its baseline at ``y``."""
    return tag("text", content, x=x, y=y, **attributes)


def tip(title: str, rows: Iterable[tuple[str, str]] = ()) -> str:
    """Content of a ``data-tip`` attribute: a title, then label and value by line."""
    return "\n".join([title, *(f"{label}\t{value}" for label, value in rows)])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], sides: str, **attributes: object) -> Markup:
    """A table; ``sides`` has ``<`` or ``>`` for every column."""
    kinds = [None if side == "<" else "n" for side in sides]
    top = tag("tr", *(tag("th", cell, class_=k, scope="col") for cell, k in zip(head, kinds, strict=True)))
    body = [
        tag("tr", *(tag("td", cell, class_=k) for cell, k in zip(row, kinds, strict=True))) for row in rows
    ]
    return tag("table", tag("thead", top), tag("tbody", *body), **attributes)


def panes(group: str, shown: Mapping[str, Markup], chosen: str) -> Markup:
    """Alternatives by key, of which the page shows ``chosen`` until a button of ``group`` is pressed."""
    return joined(
        tag("div", content, class_="pane", data_group=group, data_key=key, hidden=key != chosen)
        for key, content in shown.items()
    )


def buttons(group: str, labels: Mapping[str, str], chosen: str, *, label: str) -> Markup:
    """Buttons by key that choose among the panes of ``group``."""
    return tag(
        "div",
        *(
            tag(
                "button", name, type="button", data_group=group, data_key=key,
                aria_pressed="true" if key == chosen else "false",
            )
            for key, name in labels.items()
        ),
        class_="buttons", role="group", aria_label=label,
    )  # fmt: skip


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
