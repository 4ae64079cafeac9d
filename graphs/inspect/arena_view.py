"""The arena over time: x is the launch, y the byte offset, a rectangle is a buffer while it is alive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from makeready.graphs.inspect import units
from makeready.graphs.inspect.analysis import largest_bucket
from makeready.graphs.inspect.colours import Colours
from makeready.graphs.inspect.markup import Markup, joined, svg, tag, text, tip
from makeready.graphs.inspect.scales import Scale, byte_ticks
from makeready.graphs.inspect.segments import Segment, local, segments
from makeready.graphs.inspect.text import shape_text
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Buffer, LoweredProgram
from makeready.kernels.spec import TensorSpec

_WIDTH, _LEFT, _TOP = 1200.0, 74.0, 8.0


def live_bytes(plan: Plan, phase: str) -> list[int]:
    """Bytes that are alive during each launch, at the phase's largest bucket."""
    program, sizes = plan.programs[phase], largest_bucket(plan, phase).sizes
    alive = [0] * len(program.launches)
    for buffer in _owned(program).values():
        for at in range(buffer.first, buffer.last + 1):
            alive[at] += buffer.spec.nbytes(sizes)
    return alive


def arena_picture(plan: Plan, phase: str, colours: Colours) -> Markup:
    """All launches of a phase; a square root on the y axis, as logits dwarf what layers hand on."""
    program = plan.programs[phase]
    bucket = largest_bucket(plan, phase)
    owned = _owned(program)
    reach = max((b.offset + b.spec.nbytes(bucket.sizes) for b in owned.values()), default=1)
    height = 300.0
    x = Scale(0, len(program.launches), _LEFT, _WIDTH - 4)
    y = Scale(0, reach, _TOP + height, _TOP, root=True)
    parts = [_frame(y, x, reach), *_segment_marks(segments(program), x, _TOP + height)]
    parts += [_rectangle(plan, phase, name, b, x, y, colours) for name, b in owned.items()]
    return svg(_WIDTH, height + _TOP + 24, joined(parts), label=f"arena over the launches of {phase}")


def segment_picture(plan: Plan, phase: str, segment: Segment, colours: Colours) -> Markup:
    """The launches of one segment, wide enough to name buffers."""
    program = plan.programs[phase]
    sizes = largest_bucket(plan, phase).sizes
    owned = {n: b for n, b in _owned(program).items() if b.first < segment.stop and b.last >= segment.start}
    reach = max((b.offset + b.spec.nbytes(sizes) for b in owned.values()), default=1)
    height = 260.0
    x = Scale(segment.start, segment.stop, _LEFT, _WIDTH - 4)
    y = Scale(0, reach, _TOP + height, _TOP)
    parts = [_frame(y, x, reach)]
    for name, buffer in owned.items():
        left, right = max(buffer.first, segment.start), min(buffer.last + 1, segment.stop)
        parts.append(_rectangle(plan, phase, name, buffer, x, y, colours, (left, right)))
        label = f"{local(name)}  {units.nbytes(buffer.spec.nbytes(sizes))}"
        parts += _inside(
            label, x(left), x(right), y(buffer.offset), y(buffer.offset + buffer.spec.nbytes(sizes))
        )
    step = x(segment.start + 1) - x(segment.start)
    for at in range(segment.start, segment.stop):
        name = _fitting(program.launches[at].op, step)
        parts.append(
            text(x(at) + step / 2, _TOP + height + 16, name, class_="mono dim", text_anchor="middle")
        )
    return svg(_WIDTH, height + _TOP + 24, joined(parts), label=f"arena over {segment.name} of {phase}")


def _owned(program: LoweredProgram) -> dict[str, Buffer]:
    """Buffers that have their own bytes: columns of another one are part of it."""
    return {name: b for name, b in sorted(program.buffers.items()) if b.row_stride is None}


def _frame(y: Scale, x: Scale, reach: float) -> Markup:
    ticks = []
    for value in byte_ticks(reach, root=y.root):
        ticks.append(tag("line", x1=x.start, x2=x.stop, y1=y(value), y2=y(value), class_="grid"))
        ticks.append(text(x.start - 8, y(value) + 4, units.nbytes(value), class_="tick", text_anchor="end"))
    return joined(ticks)


def _segment_marks(found: Sequence[Segment], x: Scale, bottom: float) -> Iterator[Markup]:
    """A line where a segment starts; its name below where there is room for it."""
    free = x.start
    for segment in found:
        at = x(segment.start)
        yield tag("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="grid")
        name = segment.layer or segment.name
        middle = (at + x(segment.stop)) / 2
        half = len(name) * 3.2
        if middle - half > free and middle + half < _WIDTH:
            yield text(middle, bottom + 16, name, class_="tick", text_anchor="middle")
            free = middle + half + 6


def _rectangle(
    plan: Plan,
    phase: str,
    name: str,
    buffer: Buffer,
    x: Scale,
    y: Scale,
    colours: Colours,
    span: tuple[int, int] | None = None,
) -> Markup:
    launches = plan.programs[phase].launches
    bucket = largest_bucket(plan, phase)
    nbytes = buffer.spec.nbytes(bucket.sizes)
    left, right = span or (buffer.first, buffer.last + 1)
    made_by = launches[buffer.first].op
    filled = TensorSpec(buffer.spec.at(bucket.sizes), buffer.spec.dtype)
    content = tip(
        name,
        [
            ("shape", f"{shape_text(buffer.spec)} = {shape_text(filled)} in {bucket}"),
            ("size", f"{units.nbytes(nbytes)} ({nbytes:,} B)"),
            ("offset", f"{buffer.offset:,} to {buffer.offset + nbytes:,}"),
            ("alive", f"launch {buffer.first} ({made_by}) to {buffer.last} ({launches[buffer.last].op})"),
        ],
    )
    low, high = y(buffer.offset), y(buffer.offset + nbytes)
    return tag(
        "rect", x=x(left) + 0.5, width=max(x(right) - x(left) - 1, 0.8), y=high, height=max(low - high, 1.0),
        fill=colours.of(made_by), class_="buffer", data_tip=content,
    )  # fmt: skip


def _inside(label: str, left: float, right: float, low: float, high: float) -> list[Markup]:
    shown = _fitting(label, right - left - 10)
    if low - high < 13 or len(shown) < min(len(label), 6):
        return []
    return [text(left + 6, (low + high) / 2 + 4, shown, class_="mono inside")]


def _fitting(label: str, width: float) -> str:
    """``label`` cut to ``width`` pixels."""
    letters = int(width / 6.3)
    return label if len(label) <= letters else label[: max(letters - 1, 0)] + "…"
