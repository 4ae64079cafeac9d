"""A plan as one HTML page: no other file, no network, pictures drawn here, a little script for hovering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from makeready.graphs.inspect import arena_view, bucket_view, graph_view, memory_view, roofline_view, units
from makeready.graphs.inspect.analysis import (
    LaunchCost,
    by_kernel,
    cost_analysis,
    largest_bucket,
    launch_costs,
    memory_analysis,
)
from makeready.graphs.inspect.assets import SCRIPT, STYLE
from makeready.graphs.inspect.colours import Colours
from makeready.graphs.inspect.facts import facts, passes
from makeready.graphs.inspect.markup import Markup, buttons, joined, panes, tag
from makeready.graphs.inspect.padding import Padding, padding
from makeready.graphs.inspect.segments import Segment, groups, one_token
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import target_of

_NAV = (("memory", "Memory"), ("buckets", "Buckets"), ("kernels", "Kernels"), ("launches", "Launches"))


@dataclass(frozen=True)
class _Page:
    """A plan and the figures that several sections show."""

    plan: Plan
    context: int

    @cached_property
    def memory(self) -> dict[str, Any]:
        return memory_analysis(self.plan)

    @cached_property
    def buckets(self) -> dict[Bucket, dict[str, float]]:
        return cost_analysis(self.plan, self.context)

    @cached_property
    def padding(self) -> Padding:
        return padding(self.plan)

    @cached_property
    def launches(self) -> Mapping[str, list[LaunchCost]]:
        """Cost of every launch of a phase's largest bucket."""
        return {
            p: launch_costs(self.plan, largest_bucket(self.plan, p), self.context) for p in self.plan.programs
        }

    @cached_property
    def colours(self) -> Colours:
        return Colours(self.launches)

    def ops(self, phase: str) -> list[str]:
        return [launch.op for launch in self.plan.programs[phase].launches]


def plan_html(plan: Plan, context: int = 1024) -> str:
    """The page.

    Args:
        plan: what to explain.
        context: tokens of context a row that step times assume.
    """
    page = _Page(plan, min(context, plan.limits.context_len))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{plan.architecture} for {plan.target}: makeready plan"),
        tag("style", Markup(STYLE)),
    )
    sections = (_memory(page), _buckets(page), _kernels(page), _launches(page))
    foot = tag("footer", f"plan {plan.digest}, schema {plan.schema}")
    body = tag(
        "body",
        _header(page),
        _nav(page),
        tag("main", *sections, foot),
        tag("div", id="tip", hidden=True),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(page: _Page) -> Markup:
    plan, memory = page.plan, page.memory
    largest = [largest_bucket(plan, phase) for phase in plan.programs]
    figures = (
        (units.count(memory["parameters"]), "parameters"),
        (units.nbytes(memory["fixed"]), "fixed memory"),
        (units.nbytes(memory["kv"]["token_bytes"]), "KV cache a token"),
        *((f"{units.digits(page.buckets[b]['tokens_per_second'])} tok/s", f"bound of {b}") for b in largest),
    )
    tiles = tag("div", *(tag("div", tag("b", v), tag("span", k)) for v, k in figures), class_="tiles")
    rows = [joined([tag("dt", k), tag("dd", _value(k, v))]) for k, v in facts(plan, memory)]
    named = [tag("span", name) if on else tag("s", name) for name, on in passes(plan).items()]
    listed = joined(part for name in named for part in (name, Markup(" ")))
    rows.append(joined([tag("dt", "passes"), tag("dd", listed)]))
    title = tag("h1", plan.architecture, tag("small", f"plan for {plan.target}"))
    return tag("header", tag("div", title, tiles, tag("dl", *rows)))


def _value(label: str, value: str) -> str:
    return tag("code", value) if label in ("plan", "checkpoint") else value


def _nav(page: _Page) -> Markup:
    links = (tag("a", name, href=f"#{key}") for key, name in _NAV)
    phases = {phase: phase for phase in page.plan.programs}
    return tag("nav", tag("div", *links, buttons("phase", phases, next(iter(phases)), label="phase")))


def _section(key: str, title: str, note: str, *content: Markup) -> Markup:
    return tag("section", tag("h2", title), tag("p", note, class_="note"), *content, id=key)


def _by_phase(shown: Mapping[str, Markup]) -> Markup:
    return panes("phase", shown, next(iter(shown)))


def _memory(page: _Page) -> Markup:
    note = "Every byte the plan takes on the device; KV as if every row used its whole context."
    return _section(
        "memory", "Memory", note,
        memory_view.memory_map(page.plan, page.memory),
        tag("h3", "KV capacity by memory size"),
        tag("p", memory_view.page_facts(page.memory), class_="note"),
        memory_view.capacity_table(page.plan, page.memory),
    )  # fmt: skip


def _buckets(page: _Page) -> Markup:
    note = (
        f"Step time and tokens/s are roofline bounds at {page.context:,} tokens of context a row. Bars are the "
        "expected share of padding under the plan's traffic profile, ticks the worst batch; "
        "padded time is against a program made for the batch itself."
    )
    shown = {}
    for phase in page.plan.programs:
        listing = bucket_view.bucket_table(phase, page.buckets, page.padding)
        parts = [tag("div", listing, class_="scroll")]
        if not one_token(page.plan, phase):
            caption = "Which bucket runs which batch. Darker: more of the step is padding. Both axes are logarithmic."
            parts = [
                tag("p", caption, class_="note"),
                bucket_view.bucket_map(page.plan, phase, page.padding),
                *parts,
            ]
        shown[phase] = joined(parts)
    return _section("buckets", f"{len(page.plan.buckets)} buckets", note, _by_phase(shown))


def _kernels(page: _Page) -> Markup:
    target = target_of(page.plan)
    note = (
        f"A full step of the largest bucket at {page.context:,} tokens of context a row, on {target.name} "
        f"({target.device.name}): {units.rate(target.bandwidth, 'B')}, {units.seconds(target.launch_seconds)} a "
        "launch. Circles are memory-bound, squares compute-bound, triangles bound by their launches."
    )
    shown = {}
    for phase, costs in page.launches.items():
        kernels = by_kernel(costs, weights=True)
        whole = math.fsum(c.seconds for c in costs)
        moved, computed = math.fsum(c.nbytes for c in costs), math.fsum(c.flops for c in costs)
        title = (
            f"{largest_bucket(page.plan, phase)}: {units.seconds(whole)} a step, "
            f"{units.nbytes(moved)} moved, {units.flops(computed)}"
        )
        picture = roofline_view.roofline_picture(kernels, target, page.colours)
        listing = roofline_view.kernel_table(kernels, page.colours)
        legend = page.colours.legend(c.op for c in kernels)
        shown[phase] = joined([tag("h3", title), picture, legend, tag("div", listing, class_="scroll")])
    return _section("kernels", "Kernels and roofline", note, _by_phase(shown))


def _launches(page: _Page) -> Markup:
    note = (
        "What runs, in order, and where its results live. Layers that are launch for launch the same are shown once. "
        "T is the step's tokens, R its rows, P the KV pages; ✎ marks what a launch writes in place, blue edges pass "
        "other launches, dashed ones lead through the cache."
    )
    shown = {phase: _phase_launches(page, phase) for phase in page.plan.programs}
    return _section("launches", "Launches and arena", note, _by_phase(shown))


def _phase_launches(page: _Page, phase: str) -> Markup:
    plan, found = page.plan, {str(n): g for n, g in enumerate(groups(page.plan, phase))}
    key = f"segment-{phase}"
    common = max(found, key=lambda n: len(found[n].members))
    picker = buttons(key, {n: g.label for n, g in found.items()}, common, label="segment")
    contents = {n: _segment(page, phase, g.example) for n, g in found.items()}
    live = arena_view.live_bytes(plan, phase)
    overview = (
        f"All {len(live)} launches of {largest_bucket(plan, phase)}: buffers reach to "
        f"{units.nbytes(page.memory['arena_by_phase'][phase])} of the arena's {units.nbytes(plan.memory.arena)}; "
        f"at most {units.nbytes(max(live, default=0))} are alive at once. Square-root axis."
    )
    return joined([
        tag("div", tag("span", "segment", class_="dim"), picker, class_="pick"),
        panes(key, contents, common),
        tag("h3", "Arena over the whole step"),
        tag("p", overview, class_="note"),
        arena_view.arena_picture(plan, phase, page.colours),
        page.colours.legend(page.ops(phase)),
    ])  # fmt: skip


def _segment(page: _Page, phase: str, segment: Segment) -> Markup:
    """Graph, launch list and arena of one segment."""
    plan, costs = page.plan, page.launches[phase]
    mine = costs[segment.start : segment.stop]
    seconds = math.fsum(c.seconds for c in mine)
    share = seconds / math.fsum(c.seconds for c in costs)
    bucket = largest_bucket(plan, phase)
    title = f"{segment.name} in {bucket}: {units.seconds(seconds)}, {units.percent(share)} of the step"
    graph = graph_view.segment_picture(plan, phase, segment, costs, page.colours)
    listing = tag("div", tag("h3", title), _listing(segment, mine), class_="scroll")
    return joined([
        tag("div", tag("div", graph, class_="scroll"), listing, class_="columns"),
        tag("h3", f"Arena during {segment.name}"),
        arena_view.segment_picture(plan, phase, segment, page.colours),
    ])  # fmt: skip


def _listing(segment: Segment, costs: Sequence[LaunchCost]) -> Markup:
    head = ("", "op", "moved", "computed", "time", "bound by")
    rows = [
        tag(
            "tr",
            tag("td", str(at), class_="n dim"), tag("td", tag("code", c.op)),
            tag("td", units.nbytes(c.nbytes), class_="n"), tag("td", units.flops(c.flops), class_="n"),
            tag("td", units.seconds(c.seconds), class_="n"), tag("td", c.bound, class_=f"bound {c.bound}"),
            data_launch=at,
        )
        for at, c in enumerate(costs, segment.start)
    ]  # fmt: skip
    top = tag("tr", *(tag("th", h, class_="n" if h in ("moved", "computed", "time") else None) for h in head))
    return tag("table", tag("thead", top), tag("tbody", *rows))
