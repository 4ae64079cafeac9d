"""What a recipe means: which box of which tensor goes where. Imports no tensor library but numpy.

Everything that follows recipes (loading on CPU and GPU, verification, checks of a checkpoint, inspection)
takes them from here as :class:`Read` s: patterns unrolled, places known on every axis.

    E experts, N rows and K columns of what is assembled
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from makeready.graphs.checkpoint.base import BLOCKS, PLAIN, Checkpoint, by_part
from makeready.graphs.plan.recipe import Box, Each, Operand, Param, Piece

STORED_AS_THEY_ARE = ("float8_e4m3fn", "int8", "int32", "int64", "uint8")


@dataclass(frozen=True)
class Read:
    """A box of one tensor, and the box of what is assembled that it fills.

    Attributes:
        axes: the source's axes in the order of the last axes of ``place``.
        number: the tensor is a single number, which all of the place takes; ``box`` and ``axes`` are () then.
    """

    source: str
    box: Box
    place: Box
    axes: tuple[int, ...]
    number: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the place."""
        return tuple(stop - start for start, stop in self.place)

    @property
    def elements(self) -> int:
        """How many elements of the tensor are read."""
        return 1 if self.number else math.prod(self.shape)

    def within(self, axis: int, start: int, stop: int) -> Read | None:
        """What of the read falls into ``start:stop`` of an axis of what is assembled; None where nothing does."""
        first, last = self.place[axis]
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return None
        place = (*self.place[:axis], (low, high), *self.place[axis + 1 :])
        at = axis - (len(self.place) - len(self.axes))
        if at < 0:  # an axis of length 1 that the box lacks, or any axis of a number's place
            return replace(self, place=place)
        source = self.axes[at]
        begin = self.box[source][0] - first
        cut = (begin + low, begin + high)
        return replace(self, place=place, box=(*self.box[:source], cut, *self.box[source + 1 :]))

    def cut(self, most: int) -> Iterator[Read]:
        """The read in parts of at most ``most`` elements where rows of its outermost axis allow it."""
        axis = next((i for i, n in enumerate(self.shape) if n > 1), None)
        if axis is None:
            yield self
            return
        start, stop = self.place[axis]
        step = max(1, most * (stop - start) // max(1, math.prod(self.shape)))
        for first in range(start, stop, step):
            part = self.within(axis, first, first + step)
            assert part is not None
            yield part

    def offset(self, shape: Sequence[int]) -> int | None:
        """Elements before the place in a row-major array of ``shape``; None where it is no single run there."""
        offset, many = 0, False
        for (start, stop), n in zip(self.place, shape, strict=True):
            if many and (start, stop) != (
                0,
                n,
            ):  # something of what an axis before has more than one of is left out
                return None
            offset, many = offset * n + start, many or stop - start > 1
        return offset


def reads(operand: Operand, rows: tuple[int, int] | None = None) -> Iterator[Read]:
    """Every box that makes up ``operand``, in the order of its pieces.

    Args:
        rows: start and stop on axis 0, if not all of it is wanted; places are counted from the start.
    """
    for piece in operand.pieces:
        for read in unrolled(piece, rows):
            if rows is None:
                yield read
            elif (part := read.within(0, *rows)) is not None:
                (start, stop), *others = part.place
                yield replace(part, place=((start - rows[0], stop - rows[0]), *others))


def unrolled(piece: Piece, rows: tuple[int, int] | None = None) -> Iterator[Read]:
    """The boxes that a piece stands for; of those that have nothing of ``rows`` (on axis 0) some may be left out."""
    axes = () if piece.fills else piece.axes or tuple(range(len(piece.box)))
    lengths = piece.fills or tuple(piece.box[a][1] - piece.box[a][0] for a in axes)
    shape = (1,) * (len(piece.at) - len(lengths)) + lengths
    counts = [range(each.count) for each in piece.each]
    moving = [number for number, each in enumerate(piece.each) if each.place and each.place[0]]
    # Else experts, each by itself, would cost the square of their number.
    if rows is not None and len(moving) == 1:
        (number,) = moving
        step, begin, end = piece.each[number].place[0], piece.at[0], piece.at[0] + shape[0]
        first, stop = (rows[0] - end) // step + 1, -(-(rows[1] - begin) // step)
        counts[number] = counts[number][max(first, 0) : max(stop, 0)]
    for index, source, box in _boxes(piece, counts):
        at = piece.at
        for each, i in zip(piece.each, index, strict=True):
            if each.place:
                at = tuple(a + i * m for a, m in zip(at, each.place, strict=True))
        place = tuple((a, a + n) for a, n in zip(at, shape, strict=True))
        yield Read(source, box, place, axes, number=bool(piece.fills))


def _boxes(piece: Piece, counts: Sequence[range] | None = None) -> Iterator[tuple[tuple[int, ...], str, Box]]:
    """Indices, tensors and boxes that a piece stands for, all or those of ``counts``, its own where none moves."""
    for index in itertools.product(*(counts or [range(each.count) for each in piece.each])):
        source, box = piece.source, piece.box
        for each, i in zip(piece.each, index, strict=True):
            source = source.replace(f"{{{each.name}}}", str(i))
            if each.source:
                box = tuple((a + i * m, b + i * m) for (a, b), m in zip(box, each.source, strict=True))
        yield index, source, box


def fetch(checkpoint: Checkpoint, read: Read) -> np.ndarray:
    """What a read says, as the checkpoint stores it, in the shape of its place (a number: of shape ()).

    A view of a mapped file where the file has it in any strided form.
    """
    if read.number:
        return checkpoint.read(read.source).reshape(())
    info = checkpoint.find(read.source)
    box = tuple(slice(*r) for r in aligned(read.box, info.shape if info is not None else ()))
    lengths = [stop - start for start, stop in read.box]
    kept = sorted(read.axes)  # those left out have length 1
    array = checkpoint.read(read.source, box).reshape([lengths[a] for a in kept])
    return array.transpose([kept.index(a) for a in read.axes]).reshape(read.shape)


def aligned(box: Box, shape: Sequence[int]) -> Box:
    """A box on the axes of a tensor of ``shape``: axes of length 1 behind the first come and go."""
    if len(box) == len(shape):
        return box
    others = iter([r for r in box[1:] if r != (0, 1)])
    return (*box[:1], *((0, 1) if n == 1 else next(others) for n in shape[1:]))


@dataclass(frozen=True)
class Need:
    """What a recipe wants of a tensor: its least shape, dtypes that it becomes, whether it is one number."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    number: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the tensor may be stored as (:attr:`TensorInfo.kind`): most numbers convert."""
        exact = tuple(dtype for dtype in self.dtypes if dtype in STORED_AS_THEY_ARE)
        return exact or (PLAIN, BLOCKS)

    def fits(self, shape: Sequence[int], *, exactly: bool = False) -> bool:
        """Whether a tensor of ``shape`` will do; ``exactly`` if nothing of it may be left over.

        Axes of length 1 behind the first do not count.
        """
        if self.number:
            return math.prod(shape) == 1
        ours, theirs = _counting(self.shape), _counting(shape)
        if len(ours) != len(theirs):
            return False
        pairs = zip(ours, theirs, strict=True)
        return all(n == m for n, m in pairs) if exactly else all(n <= m for n, m in pairs)


def _counting(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:1], *(n for n in shape[1:] if n != 1))


def needs(params: Iterable[Param]) -> dict[str, Need]:
    """What all of ``params`` together want of the checkpoint, by tensor.

    Tensors that one piece stands for, such as those of experts, share one object where they are of one shape.
    """
    found: dict[str, Need] = {}
    for param in params:
        for operand in param.operands:
            for piece in operand.pieces:
                last, fresh = None, Need((), ())
                for _, source, box in _boxes(piece):
                    if box is not last:
                        shape = (1,) if piece.fills else tuple(stop for _, stop in box)
                        last, fresh = box, Need(shape, (operand.spec.dtype,), bool(piece.fills))
                    one = found.setdefault(source, fresh)
                    if one is not fresh:
                        found[source] = _both(one, fresh)
    return found


def _both(one: Need, other: Need) -> Need:
    most = max if len(other.shape) == len(one.shape) else None
    least = tuple(map(most, one.shape, other.shape)) if most else max(one.shape, other.shape, key=len)
    dtypes = (*one.dtypes, *(dtype for dtype in other.dtypes if dtype not in one.dtypes))
    return Need(least, dtypes, one.number and other.number)


def declare_needs(checkpoint: Checkpoint, wanted: Mapping[str, Need]) -> None:
    """Tell a dummy checkpoint, which has what it is asked for, what that is; others know."""
    for part, names in by_part(checkpoint, wanted).values():
        if part.format != "dummy":
            continue
        needed = {own: wanted[name] for own, name in names.items()}
        exact = {source: need.kinds[0] for source, need in needed.items()}
        part.declare(  # type: ignore[attr-defined]
            {source: need.shape for source, need in needed.items()},
            {source: kind for source, kind in exact.items() if kind in STORED_AS_THEY_ARE},
        )


def complaint(operand: Operand) -> str:
    """What is wrong with how pieces make up an operand; empty where each element comes from one of them, but for
    its padding.
    """
    if operand.largest:
        numbers = all(piece.fills for piece in operand.pieces) and not operand.padding
        return "" if numbers else "is the largest of what are no numbers"
    shape = operand.spec.at({})
    padding = operand.padding or (0,) * len(shape)
    if len(padding) != len(shape) or not all(0 <= p < n for p, n in zip(padding, shape, strict=True)):
        return f"are padded by {list(padding)}, which does not fit {list(shape)}"
    return _complaint(operand.pieces, tuple(n - p for n, p in zip(shape, padding, strict=True)))


@lru_cache(maxsize=2**14)  # programs are verified behind every pass
def _complaint(pieces: tuple[Piece, ...], shape: tuple[int, ...]) -> str:
    for piece in pieces:
        if reason := _malformed(piece, len(shape)):
            return reason
    places = [read.place for piece in pieces for read in unrolled(piece)]
    untiled = f"do not tile its {list(shape)}"
    if any(start < 0 or stop > n for place in places for (start, stop), n in zip(place, shape, strict=True)):
        return untiled
    # Count how often each cell between neighbouring bounds is covered.
    bounds = [sorted({0, n, *itertools.chain(*(p[axis] for p in places))}) for axis, n in enumerate(shape)]
    index = [{bound: i for i, bound in enumerate(axis)} for axis in bounds]
    covered = np.zeros([len(axis) - 1 for axis in bounds], np.int32)
    for place in places:
        covered[
            tuple(slice(at[start], at[stop]) for at, (start, stop) in zip(index, place, strict=True))
        ] += 1
    return "" if bool((covered == 1).all()) else untiled


def _malformed(piece: Piece, rank: int) -> str:
    kept = piece.axes or tuple(range(len(piece.box)))
    sound = (
        len(piece.at) == rank
        and bool(piece.box) != bool(piece.fills)
        and len(piece.fills or kept) <= rank
        and len(set(kept)) == len(kept)
        and all(a < len(piece.box) for a in kept)
        and all(0 <= start < stop for start, stop in piece.box)
        and all(b - a == 1 for i, (a, b) in enumerate(piece.box) if i not in kept)
        and all(_moves(each, piece, rank) for each in piece.each)
    )
    return "" if sound else f"have a piece of {piece.source} whose box, axes and place do not belong together"


def _moves(each: Each, piece: Piece, rank: int) -> bool:
    return (
        each.count > 0
        and len(each.source) in (0, len(piece.box))
        and len(each.place) in (0, rank)
        and all(move >= 0 for move in each.source)
        and (f"{{{each.name}}}" in piece.source or any(each.source) or any(each.place))
    )
