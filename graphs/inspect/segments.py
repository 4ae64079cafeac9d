"""Which part of the model a launch belongs to, and which layers are launch for launch the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from makeready.graphs.inspect.units import ranges
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Launch, LoweredProgram
from makeready.kernels.spec import ROWS, TOKENS, TensorSpec

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Segment:
    """Launches ``start:stop`` of a program: one layer, or what comes before or after all layers.

    ``layer`` is its number in decimal, empty before and after.
    """

    name: str
    layer: str
    start: int
    stop: int


@dataclass(frozen=True)
class SegmentGroup:
    """Segments that run the same launches over the same shapes; ``members[0]`` stands for all."""

    label: str
    members: tuple[Segment, ...]

    @property
    def example(self) -> Segment:
        """The segment to show."""
        return self.members[0]


def local(name: str) -> str:
    """A value's name without its layer: ``layers.3.attention.o.weight`` → ``attention.o.weight``."""
    return _LAYER.sub("", name, count=1) if _LAYER.match(name) else name


def one_token(plan: Plan, phase: str) -> bool:
    """Whether every row of such steps has one token, so that tokens are rows."""
    step = plan.steps.get(phase)
    return step is not None and step.each == 1


def value_spec(plan: Plan, phase: str, name: str) -> TensorSpec:
    """Spec of a value as the phase's launches see it: where rows have one token, there are as many as rows."""
    spec = plan.spec(phase, name)
    if one_token(plan, phase):
        return spec.renamed({TOKENS: ROWS})
    return spec


def segments(program: LoweredProgram) -> tuple[Segment, ...]:
    """The program cut into embedding, layers and head, in order, without gaps.

    A launch belongs to the layer whose weight or cache it names; one that names none to the layer named
    next, so that a residual add counts to the norm behind it whether the two are fused or not. Before the
    first layer the next name does not count: what names no layer there is the embedding. After the last
    one all is the head.
    """
    named = [_layer(launch) for launch in program.launches]
    first = next((i for i, layer in enumerate(named) if layer), len(named))
    layers = [""] * len(named)
    following = ""
    for at in range(len(named) - 1, first - 1, -1):
        following = named[at] or following
        layers[at] = following
    found, at = [], 0
    for layer, run in groupby(layers):
        stop = at + len(list(run))
        name = f"layer {layer}" if layer else "embedding" if at < first else "head"
        found.append(Segment(name, layer, at, stop))
        at = stop
    return tuple(found)


def groups(plan: Plan, phase: str) -> tuple[SegmentGroup, ...]:
    """The phase's segments, those alike taken together, in order of first appearance."""
    program = plan.programs[phase]
    alike: dict[Any, list[Segment]] = {}
    for segment in segments(program):
        key = (segment.layer == "" and segment.name, tuple(_signature(plan, program, segment)))
        alike.setdefault(key, []).append(segment)
    return tuple(SegmentGroup(_label(members), tuple(members)) for members in alike.values())


def _layer(launch: Launch) -> str:
    """The layer whose weight or cache a launch names."""
    matches = (_LAYER.match(value) for _, value in sorted(launch.operands.items()))
    return next((m[1] for m in matches if m), "")


def _signature(plan: Plan, program: LoweredProgram, segment: Segment) -> Iterator[tuple[Any, ...]]:
    """Every launch without the names that tell layers apart: values by the order of their appearance."""
    order: dict[str, int] = {}

    def values(named: Mapping[str, str]) -> tuple[Any, ...]:
        return tuple(
            (role, value_spec(plan, program.phase, v), order.setdefault(local(v), len(order)))
            for role, v in sorted(named.items())
        )

    for launch in program.launches[segment.start : segment.stop]:
        attrs = tuple(sorted((k, str(v)) for k, v in launch.attrs.items()))
        yield launch.op, launch.kernel, attrs, values(launch.operands), values(launch.results)


def _label(members: Sequence[Segment]) -> str:
    if len(members) == 1:
        return members[0].name
    return f"layers {ranges([int(m.layer) for m in members])}"
