"""The launch graph of one segment as a picture: boxes are launches, edges values with their shapes.

Weights, caches and fields that the host stages stand inside the boxes that use them; edges are what flows
from launch to launch. Edges past other launches (residuals) are drawn in their own lane and colour; a
cache that is written before it is read makes a dashed edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from makeready.graphs.inspect import units
from makeready.graphs.inspect.analysis import LaunchCost, contracts
from makeready.graphs.inspect.colours import Colours
from makeready.graphs.inspect.layout import Layout, arrange
from makeready.graphs.inspect.markup import Markup, joined, svg, tag, text, tip
from makeready.graphs.inspect.segments import Segment, local, value_spec
from makeready.graphs.inspect.text import shape_text
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Launch

_CHAR, _ROW, _HEAD, _PAD = (
    6.3,
    16.0,
    24.0,
    9.0,
)  # pixels: a monospace letter at 10.5 px, a row, a header, sides
_BOLD = 7.6  # a letter of a title
_MARGIN = 12.0
_LABEL = 76.0  # room for a shape to the right of the last lane
_MOST_ROWS = 8


@dataclass(frozen=True)
class _Row:
    """An operand inside a box."""

    kind: str
    name: str
    shape: str


@dataclass
class _Box:
    """A launch, or a value that comes in or goes out; ``side``: it runs in the side lane."""

    title: str
    badge: str = ""
    rows: list[_Row] = field(default_factory=list)
    tip: str = ""
    op: str = ""
    launch: int = -1
    side: bool = False

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in pixels."""
        widest = max((len(r.kind) + len(r.name) + len(r.shape) + 4 for r in self.rows), default=0)
        title = len(self.title) * (_BOLD / _CHAR if self.op else 1)
        letters = max(widest, title + len(self.badge) + 3)
        height = _HEAD + (self.op != "") * (_ROW * len(self.rows) + (6 if self.rows else 0))
        return max(120.0 if self.op else 0.0, letters * _CHAR + 2 * _PAD), height


@dataclass(frozen=True)
class _Edge:
    source: str
    target: str
    value: str
    cache: bool = False


def segment_picture(
    plan: Plan, phase: str, segment: Segment, costs: Sequence[LaunchCost], colours: Colours
) -> Markup:
    """The launch graph of ``segment``; ``costs`` are those of the whole program."""
    boxes, edges, late, last = _collect(plan, phase, segment, costs)
    layout = arrange(
        {key: box.size for key, box in boxes.items()},
        [(e.source, e.target) for e in edges],
        late=late,
        last=last,
    )
    drawn = joined(_edges(plan, phase, boxes, edges, layout))
    drawn = joined([drawn, *(_box(box, *layout.places[key], colours) for key, box in boxes.items())])
    beside = _LABEL if any(layout.lanes) else 0.0
    return svg(
        layout.width + 2 * _MARGIN + beside,
        layout.height + 2 * _MARGIN,
        tag("g", drawn, transform=f"translate({_MARGIN} {_MARGIN})"),
        label=f"launches of {segment.name}, {phase}",
    )


def _collect(
    plan: Plan, phase: str, segment: Segment, costs: Sequence[LaunchCost]
) -> tuple[dict[str, _Box], list[_Edge], list[str], list[str]]:
    """Boxes by key in an order in which edges go forward, edges, and the keys of what comes in and goes out."""
    program = plan.programs[phase]
    inside = range(segment.start, segment.stop)
    made = {v: f"#{at}" for at in inside for v in program.launches[at].results.values()}
    outside = {
        v for at, launch in enumerate(program.launches) if at not in inside for v in launch.results.values()
    }
    boxes: dict[str, _Box] = {}
    edges: list[_Edge] = []
    written: dict[str, str] = {}
    for at in inside:
        launch = program.launches[at]
        box = _Box(
            launch.op,
            costs[at].kernel,
            tip=_launch_tip(plan, phase, at, launch, costs[at]),
            op=launch.op,
            launch=at,
            side=any(lane.first <= at < lane.stop for lane in program.lanes),
        )
        for role, value in sorted(launch.operands.items()):
            if value in made:
                edges.append(_Edge(made[value], f"#{at}", value))
            elif value in outside:
                if f">{value}" not in boxes:
                    boxes[f">{value}"] = _port(plan, phase, value)
                edges.append(_Edge(f">{value}", f"#{at}", value))
            else:
                box.rows.append(_row(plan, phase, launch, role, value))
                if value in written and _new(edges, written[value], f"#{at}"):
                    edges.append(_Edge(written[value], f"#{at}", value, cache=True))
        box.rows = _shortened(box.rows)
        boxes[f"#{at}"] = box
        written |= {launch.operands[r]: f"#{at}" for r in contracts()[launch.op].writes}
    last = []
    for value in _leaving(plan, phase, segment):
        boxes[f"<{value}"] = _port(plan, phase, value)
        edges.append(_Edge(made[value], f"<{value}", value))
        last.append(f"<{value}")
    return boxes, edges, [key for key in boxes if key.startswith(">")], last


def _new(edges: Sequence[_Edge], source: str, target: str) -> bool:
    return not any(e.cache and (e.source, e.target) == (source, target) for e in edges)


def _leaving(plan: Plan, phase: str, segment: Segment) -> list[str]:
    """Values of the segment that a later launch or the host reads."""
    program = plan.programs[phase]
    later = {v for launch in program.launches[segment.stop :] for v in launch.operands.values()}
    results = [
        v for n in range(segment.start, segment.stop) for _, v in sorted(program.launches[n].results.items())
    ]
    return [v for v in results if v in later or v not in program.buffers]


def _port(plan: Plan, phase: str, value: str) -> _Box:
    spec = value_spec(plan, phase, value)
    title = f"{local(value)}  {shape_text(spec)}"
    return _Box(title, tip=tip(value, [("shape", shape_text(spec))]))


def _row(plan: Plan, phase: str, launch: Launch, role: str, value: str) -> _Row:
    caches = {part.name for part in plan.kv.parts}
    slots = {f.name for f in plan.slots}
    steps = {f.name for step in plan.steps.values() for f in step.staged}
    kind = "kv" if value in caches else "slot" if value in slots else "step" if value in steps else "weight"
    if role in contracts()[launch.op].writes:
        kind += " ✎"
    return _Row(kind, local(value), shape_text(value_spec(plan, phase, value)))


def _shortened(rows: list[_Row]) -> list[_Row]:
    if len(rows) <= _MOST_ROWS:
        return rows
    kept = rows[: _MOST_ROWS - 1]
    return [*kept, _Row("", f"and {len(rows) - len(kept)} more", "")]


def _launch_tip(plan: Plan, phase: str, at: int, launch: Launch, cost: LaunchCost) -> str:
    rows = [("kernel", f"{launch.op}/{cost.kernel}")]
    for sign, named in (("← ", launch.operands), ("→ ", launch.results)):
        rows += [
            (sign + r, f"{v}  {shape_text(value_spec(plan, phase, v))}") for r, v in sorted(named.items())
        ]
    rows += [(name, str(value)) for name, value in sorted(launch.attrs.items()) if value not in ("", None)]
    for lane in plan.programs[phase].lanes:
        if lane.first <= at < lane.stop:
            rows.append(("lane", f"beside launches {lane.fork + 1} to {lane.first - 1}"))
    rows += [
        ("moved", units.nbytes(cost.nbytes)),
        ("computed", units.flops(cost.flops)),
        ("time", f"{units.seconds(cost.seconds)}, {cost.bound}-bound"),
    ]
    return tip(f"launch {at}", rows)


def _box(box: _Box, x: float, y: float, colours: Colours) -> Markup:
    width, height = box.size
    if not box.op:
        pill = tag("rect", x=x, y=y, width=width, height=height, rx=12, class_="port")
        name = text(x + width / 2, y + 16, box.title, class_="mono", text_anchor="middle")
        return tag("g", pill, name, data_tip=box.tip)
    colour = colours.of(box.op)
    parts = [
        tag("rect", x=x, y=y, width=width, height=height, rx=5, class_="box side" if box.side else "box"),
        tag("rect", x=x, y=y + 3, width=4, height=height - 6, rx=2, fill=colour),
        text(x + _PAD + 2, y + 16, box.title, class_="op"),
        text(x + width - _PAD, y + 16, box.badge, class_="mono dim", text_anchor="end"),
    ]
    for at, row in enumerate(box.rows):
        base = y + _HEAD + 12 + at * _ROW
        kind = tag("tspan", f"{row.kind} ", class_="dim") if row.kind else Markup("")
        parts.append(tag("text", kind, row.name, x=x + _PAD + 2, y=base, class_="mono"))
        parts.append(text(x + width - _PAD, base, row.shape, class_="mono dim", text_anchor="end"))
    return tag("g", *parts, class_="launch", data_tip=box.tip, data_launch=box.launch)


def _edges(
    plan: Plan, phase: str, boxes: Mapping[str, _Box], edges: Sequence[_Edge], layout: Layout
) -> Iterator[Markup]:
    ports = _ports(boxes, edges, layout)
    for at, edge in enumerate(edges):
        (start, end), lanes = ports[at], layout.lanes[at]
        kind = "cache" if edge.cache else "skip" if lanes else "flow"
        line = tag("path", d=_path(start, lanes, end), class_=f"edge {kind}")
        head = tag("path", d=f"M{end[0] - 3.5:.1f} {end[1] - 7:.1f}h7l-3.5 7z", class_=f"head {kind}")
        content = tip(edge.value, [("shape", shape_text(value_spec(plan, phase, edge.value)))])
        hit = tag("path", d=_path(start, lanes, end), class_="hit", data_tip=content)
        yield tag("g", line, head, hit, class_="link")
    yield from _edge_labels(plan, phase, edges, layout, [start for start, _ in ports])


def _edge_labels(
    plan: Plan, phase: str, edges: Sequence[_Edge], layout: Layout, starts: Sequence[tuple[float, float]]
) -> Iterator[Markup]:
    """The shape of every value that a launch of the picture hands to another, once."""
    labelled: set[str] = set()
    for at, edge in enumerate(edges):
        inner = edge.source.startswith("#") and edge.target.startswith("#")
        if edge.cache or edge.value in labelled or not inner:
            continue
        labelled.add(edge.value)
        shape = shape_text(value_spec(plan, phase, edge.value))
        if lanes := layout.lanes[at]:
            x, top, bottom = lanes[0]
            yield text(x + 6, (top + bottom) / 2 + 4, shape, class_="mono shape skip")
            continue
        # To the left where something else leaves to the right.
        x, y = starts[at]
        ways = [(layout.lanes[n], starts[n]) for n, e in enumerate(edges) if e.source == edge.source]
        left = x < max(lanes[0][0] if lanes else start[0] for lanes, start in ways)
        offset, anchor = (-6, "end") if left else (6, "start")
        yield text(x + offset, y + 13, shape, class_="mono shape", text_anchor=anchor)


def _ports(
    boxes: Mapping[str, _Box], edges: Sequence[_Edge], layout: Layout
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Where each edge leaves and enters: one place a value at the bottom, one an edge at the top."""

    def centre(key: str) -> float:
        return layout.places[key][0] + boxes[key].size[0] / 2

    def towards(numbers: Sequence[int]) -> float:
        """Where edges of one value go, on average: the first lane or the target."""
        places = [layout.lanes[n][0][0] if layout.lanes[n] else centre(edges[n].target) for n in numbers]
        return sum(places) / len(places)

    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    for key, box in boxes.items():
        x, width = layout.places[key][0], box.size[0]
        leaving: dict[str, list[int]] = {}
        for at, edge in enumerate(edges):
            if edge.source == key:
                leaving.setdefault("cache" if edge.cache else edge.value, []).append(at)
        for i, numbers in enumerate(sorted(leaving.values(), key=towards)):
            starts.update((at, x + width * (i + 1) / (len(leaving) + 1)) for at in numbers)
        entering = [at for at, edge in enumerate(edges) if edge.target == key]
        entering.sort(key=lambda n: layout.lanes[n][-1][0] if layout.lanes[n] else centre(edges[n].source))
        for i, at in enumerate(entering):
            ends[at] = x + width * (i + 1) / (len(entering) + 1)
    return [
        (
            (starts[at], layout.places[e.source][1] + boxes[e.source].size[1]),
            (ends[at], layout.places[e.target][1]),
        )
        for at, e in enumerate(edges)
    ]


def _path(
    start: tuple[float, float], lanes: Sequence[tuple[float, float, float]], end: tuple[float, float]
) -> str:
    """Vertical through each lane, S-curves between; stops short of the arrow's head."""
    points = [start]
    for x, top, bottom in lanes:
        points += [(x, top), (x, bottom)]
    points.append((end[0], end[1] - 6))
    d = [f"M{start[0]:.1f} {start[1]:.1f}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        d.append(f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}")
    return "".join(d)
