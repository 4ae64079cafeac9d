"""Where a parameter's bytes come from: the part of a plan that lets it be kept apart from the weights.

A recipe names boxes of the checkpoint's tensors, in Hugging Face's spelling, and where they go. A
parameter's shape, mesh axes, quantizability and source are declared once, where the model uses it
(graphs/layers/parameter.py); merged, quantized, sharded and converted parameters are derived from that.
What a recipe means is said in one place: graphs/plan/reads.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from makeready.kernels.spec import TensorSpec

Box: TypeAlias = tuple[tuple[int, int], ...]  # start and stop on every axis

CHUNK_BYTES = (
    8 * 2**20
)  # of checkpoint rows that go to a GPU at once: a pinned buffer, a load program's input
LOADERS = 8  # threads that load at most: 40 GB/s from the page cache on 16 cores, 35 with 12


@dataclass(frozen=True)
class Each:
    """An index of a piece that stands for many: ``name`` takes every number below ``count``.

    Attributes:
        name: what the piece's source has in braces; where it has not, all of them are of one tensor.
        source, place: how far box and place move on every axis when the index grows by one; () for not at all.
    """

    name: str
    count: int
    source: tuple[int, ...] = ()
    place: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A box of a checkpoint tensor, or of many tensors of one pattern, and where it goes.

    Attributes:
        source: the tensor's name; ``...experts.{e}.up_proj.weight`` with an index ``e`` in ``each``.
        box: ranges on every axis of the source. Axes of length 1 behind the first need not agree with the
            tensor's, since scales come as ``[N]`` and as ``[N, 1]``.
        at: where the box begins, on every axis of what is assembled. A place has the box's axes last; the
            axes before them have length 1.
        axes: the source's axes in the order of the place's: ``(1, 0)`` transposes; axes left out have length
            1; () takes all of them as they are.
        each: indices over which the piece is repeated.
        fills: the tensor is a single number, which fills a place of this shape; ``box`` is () then.
    """

    source: str
    box: Box
    at: tuple[int, ...]
    axes: tuple[int, ...] = ()
    each: tuple[Each, ...] = ()
    fills: tuple[int, ...] = ()


def whole(source: str, shape: Sequence[int], at: Sequence[int] | None = None) -> Piece:
    """All of a tensor of ``shape``, placed at ``at`` or at the origin."""
    return Piece(source, tuple((0, int(n)) for n in shape), tuple(at or [0] * len(shape)))


@dataclass(frozen=True)
class Operand:
    """A tensor that is put together of pieces, converted to its dtype.

    Attributes:
        largest: the pieces are numbers, and the tensor is the largest of them.
        unit: of a derivation's operand: rows (of axis 0) that belong together. A derivation may be run for
            some units alone: unit i of every operand gives unit i of every result. 0 where every run needs
            the whole operand.
        padding: how much of the end of every axis no piece gives: zeros; () for none.
    """

    spec: TensorSpec
    pieces: tuple[Piece, ...]
    largest: bool = False
    unit: int = 0
    padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class LoadCall:
    """A contract's call while weights are loaded: operand and result names → names of values, attributes."""

    op: str
    operands: Mapping[str, str]
    results: Mapping[str, str]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Derivation:
    """A small program from the checkpoint's boxes to parameters: operands by name, then calls in order.

    Values are defined once. Parameters with equal derivations are results of one run (a weight and its scale).
    """

    operands: Mapping[str, Operand]
    calls: tuple[LoadCall, ...]

    @property
    def units(self) -> int:
        """How many units it may be cut into; 1 where it must run as a whole."""
        cut = [o for o in self.operands.values() if o.unit]
        return max((-(-int(o.spec.shape[0]) // o.unit) for o in cut), default=1)

    def rows(self, first: int, stop: int) -> dict[str, tuple[int, int]]:
        """Start and stop, on axis 0, of what units ``first:stop`` take of every operand."""
        found = {}
        for name, o in self.operands.items():
            rows = int(o.spec.shape[0])
            found[name] = (first * o.unit, min(stop * o.unit, rows)) if o.unit else (0, rows)
        return found


@dataclass(frozen=True)
class Derived:
    """A parameter that is the value ``result`` of a derivation, with as many elements in any shape."""

    by: Derivation
    result: str


@dataclass(frozen=True)
class Generated:
    """A constant that the loader computes: a function of ``graphs.constants`` and its arguments."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Param:
    """A tensor in the plan's weights region.

    Attributes:
        name: unique in the plan.
        spec: shape and the dtype it is stored in.
        pieces: what it is put together from, or
        generated: how it is computed, or
        derived: which program's result it is; exactly one of the three is there.
        largest, padding: see :class:`Operand`.
        shard: the mesh axis that splits each of its axes (``("tp", None)``: rows over tensor-parallel ranks);
            () where every rank holds all of it.
        quantizable: whether quantizations apply.
        layout: ``rows`` (dense, row-major), or a layout that the CPU's kernel packs it into. On a GPU another
            form is what a derivation makes.
    """

    name: str
    spec: TensorSpec
    pieces: tuple[Piece, ...] = ()
    generated: Generated | None = None
    derived: Derived | None = None
    largest: bool = False
    padding: tuple[int, ...] = ()
    shard: tuple[str | None, ...] = ()
    quantizable: bool = False
    layout: str = "rows"

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Everything that is read for it: itself, or the operands of its derivation."""
        if self.derived is not None:
            return tuple(self.derived.by.operands.values())
        return (Operand(self.spec, self.pieces, self.largest, padding=self.padding),) if self.pieces else ()


def joined(names: Sequence[str]) -> str:
    """One name for several: ``a.q.weight``, ``a.k.weight`` → ``a.q+k.weight``."""
    paths = [name.split(".") for name in names]
    if len({len(path) for path in paths}) > 1:
        return "+".join(names)
    columns = zip(*paths, strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else "+".join(parts) for parts in columns)


def kind(param: Param) -> Hashable:
    """What parameters must have in common to be concatenated: all but names, sources and rows."""
    shared: tuple[Hashable, ...] = (param.spec.dtype, param.spec.shape[1:], param.shard, param.quantizable)
    if param.derived is None:
        return *shared, param.padding, param.generated is None and not param.largest
    by = param.derived.by
    calls = [(c.op, *(tuple(sorted(m.items())) for m in (c.operands, c.results, c.attrs))) for c in by.calls]
    operands = [
        (name, o.spec.dtype, o.spec.shape[1:], o.largest, o.unit, o.padding, () if o.unit else o.pieces)
        for name, o in by.operands.items()
    ]
    return *shared, param.derived.result, tuple(calls), tuple(operands)


def can_concatenate(params: Sequence[Param]) -> bool:
    """Whether :func:`concatenate` gives what each of ``params`` is by itself: no unit would hold rows of two."""
    if len({kind(param) for param in params}) > 1:
        return False
    if any(any(o.padding[:1]) for o in params[0].operands):  # rows of zeros would lie between
        return False
    if params[0].derived is None:
        return bool(params[0].pieces) and not params[0].largest
    return all(
        o.unit and int(o.spec.shape[0]) % o.unit == 0 for param in params[:-1] for o in param.operands
    ) and all(o.unit for o in params[-1].operands)


def concatenate(params: Sequence[Param]) -> Param:
    """One parameter with the rows of all, in order; see :func:`can_concatenate`."""
    first = params[0]
    rows = sum(int(param.spec.shape[0]) for param in params)
    name, spec = joined([p.name for p in params]), _with_rows(first.spec, rows)
    if first.derived is None:
        made = _concatenated([Operand(p.spec, p.pieces) for p in params])
        return replace(first, name=name, spec=spec, pieces=made.pieces)
    programs = [p.derived.by for p in params if p.derived is not None]
    operands = {key: _concatenated([by.operands[key] for by in programs]) for key in programs[0].operands}
    derived = replace(first.derived, by=replace(first.derived.by, operands=operands))
    return replace(first, name=name, spec=spec, derived=derived)


def _concatenated(operands: Sequence[Operand]) -> Operand:
    pieces: list[Piece] = []
    rows = 0
    for operand in operands:
        pieces += [replace(piece, at=(piece.at[0] + rows, *piece.at[1:])) for piece in operand.pieces]
        rows += int(operand.spec.shape[0])
    return replace(operands[0], spec=_with_rows(operands[0].spec, rows), pieces=tuple(pieces))


def _with_rows(spec: TensorSpec, rows: int) -> TensorSpec:
    return replace(spec, shape=(rows, *spec.shape[1:]))
