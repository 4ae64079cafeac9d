"""Memory: what a loaded plan takes, and how many tokens the rest of a machine holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from makeready.graphs.inspect import units
from makeready.graphs.inspect.markup import Markup, joined, svg, table, tag, tip
from makeready.graphs.plan.plan import Plan

_WIDTH, _BAR = 1200.0, 420.0
_REGIONS = {"weights": 0, "arena": 1, "step": 6, "slot": 2, "result": 7, "scratch": 4, "KV": 3}


def memory_map(plan: Plan, memory: Mapping[str, Any]) -> Markup:
    """All regions as one bar, to scale, KV as if every row used its full context; figures below."""
    kv = memory["kv"]
    regions = {name: size for name, size in memory["regions"].items() if size}
    regions["KV"] = kv["full_bytes"]
    whole = sum(regions.values())
    parts, at = [], 0.0
    for name, size in regions.items():
        width, share = _WIDTH * size / whole, units.percent(size / whole)
        parts.append(
            tag(
                "rect", x=at, y=0, width=max(width, 1.0), height=34, fill=f"var(--c{_REGIONS[name]})",
                data_tip=tip(name, [("size", f"{units.nbytes(size)} ({size:,} B)"), ("share", share)]),
            )
        )  # fmt: skip
        if width > 90:
            label = f"{name}  {units.nbytes(size)}"
            parts.append(tag("text", label, x=at + 10, y=22, class_="onbar"))
        at += width
    notes = _notes(plan, memory)
    rows: list[tuple[str, ...]] = [
        (
            tag("span", tag("i", style=f"background:var(--c{_REGIONS[name]})"), name, class_="swatch"),
            units.nbytes(size), f"{size:,}", units.percent(size / whole), notes[name],
        )
        for name, size in regions.items()
    ]  # fmt: skip
    rows.append(("in all", units.nbytes(whole), f"{whole:,}", "", ""))
    figures = table(("region", "size", "bytes", "share", ""), rows, "<>>><", class_="total")
    return joined([svg(_WIDTH, 34, joined(parts), label="memory by region"), figures])


def _notes(plan: Plan, memory: Mapping[str, Any]) -> dict[str, str]:
    by_dtype = ", ".join(f"{units.dtype(d)} {units.nbytes(b)}" for d, b in memory["weights_by_dtype"].items())
    again = (
        f"; {units.nbytes(memory['stored_twice'])} of it stored a second time"
        if memory["stored_twice"]
        else ""
    )
    reach = ", ".join(f"{phase} reaches {units.nbytes(b)}" for phase, b in memory["arena_by_phase"].items())
    rows, kv = plan.limits.max_rows, memory["kv"]
    return {
        "weights": by_dtype + again,
        "arena": reach,
        "step": "what the host writes for every step",
        "slot": f"what the device keeps for each of {rows} running requests, and for padding",
        "result": "what the host reads after every step",
        "scratch": "what kernels share among their blocks",
        "KV": f"{kv['full_pages']:,} pages: {rows} rows of {plan.limits.context_len:,} tokens, and the null page"
        + "".join(f"; {some['blocks']:,} blocks of {name}" for name, some in kv["bounded"].items()),
    }


def capacity_table(plan: Plan, memory: Mapping[str, Any]) -> Markup:
    """KV tokens by memory size; the bar grows with the logarithm, one step a doubling."""
    capacity = memory["capacity"]
    most = max(max(c["tokens"] for c in capacity.values()), 2)
    rows = []
    for gib, c in capacity.items():
        share = math.log2(max(c["tokens"], 1)) / math.log2(most)
        bar = svg(
            _BAR, 10,
            tag("rect", x=0, y=1, width=_BAR, height=8, class_="track"),
            tag("rect", x=0, y=1, width=share * _BAR, height=8, class_="filled kv"),
            label=f"{c['tokens']:,} tokens",
        )  # fmt: skip
        tokens = f"{c['tokens']:,}" if c["tokens"] else "none"
        rows.append((f"{gib} GiB", f"{c['pages']:,}", tokens, bar, f"{c['rows']:,}"))
    head = ("memory", "KV pages", "KV tokens", "", f"rows of {plan.limits.context_len:,} tokens")
    return table(head, rows, ">>><>", class_="capacity")


def page_facts(memory: Mapping[str, Any]) -> str:
    """One sentence on pages."""
    kv = memory["kv"]
    made = ", ".join(f"{units.nbytes(b)} {units.dtype(d)}" for d, b in kv["dtypes"].items())
    return (
        f"A token takes {units.nbytes(kv['token_bytes'])} over all layers, a page of {kv['page_size']} tokens "
        f"{units.nbytes(kv['page_bytes'])} ({made})."
        + "".join(
            f" There are {some['blocks']:,} blocks of {name}, {units.nbytes(some['block_bytes'])} each."
            for name, some in kv["bounded"].items()
        )
    )
