"""Where things lie: field layouts, and offsets of temps in the arena by liveness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.program import Buffer
from makeready.graphs.plan.spec import Bucket, Field

ALIGNMENT = (
    256  # bytes; what cudaMalloc gives and TMA descriptors, vector loads and cache lines are happy with
)


def align(nbytes: int) -> int:
    """``nbytes`` rounded up to :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def layout(fields: Iterable[Field], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Byte offset of every field when they lie one after the other, and the bytes of all."""
    offsets, end = {}, 0
    for field in fields:
        offsets[field.name] = end
        end += align(field.spec.nbytes(sizes))
    return offsets, end


@dataclass(frozen=True)
class Interval:
    """Bytes needed from launch ``first`` to launch ``last``, both included."""

    name: str
    nbytes: int
    first: int
    last: int

    def meets(self, other: Interval) -> bool:
        """Whether both are alive at some launch."""
        return self.first <= other.last and other.first <= self.last


def assign(intervals: Sequence[Interval]) -> tuple[dict[str, int], int]:
    """Offsets under which no two intervals that are alive together overlap, and the bytes of the arena.

    Greedy by size (Pisarchyk and Lee 2020, arXiv:2001.03288): largest first, each at the lowest aligned
    offset that is free among those already placed; ties by first launch, then name, so that the result
    depends on nothing else.
    """
    offsets: dict[str, int] = {}
    placed: list[Interval] = []
    total = 0
    for interval in sorted(intervals, key=lambda i: (-i.nbytes, i.first, i.name)):
        taken = sorted((offsets[p.name], align(p.nbytes)) for p in placed if p.meets(interval))
        offset = 0
        for start, nbytes in taken:
            if offset + interval.nbytes <= start:
                break
            offset = max(offset, start + nbytes)
        offsets[interval.name] = offset
        placed.append(interval)
        total = max(total, offset + align(interval.nbytes))
    return offsets, total


def prove_places(buffers: Mapping[str, Buffer], buckets: Iterable[Bucket], largest: Bucket) -> None:
    """Check that a place that is large enough in the ``largest`` bucket is in all.

    So it is where no axis of another bucket is longer, since sizes never fall while an axis grows
    (kernels/size.py).

    Raises:
        PlanError: a bucket needs more of a buffer's place.
    """
    specs = {buffer.spec: name for name, buffer in buffers.items()}
    held = {spec: spec.nbytes(largest.sizes) for spec in specs}
    for bucket in buckets:
        for spec, name in specs.items():
            if spec.nbytes(bucket.sizes) > held[spec]:
                raise PlanError(
                    f"{name} takes {spec.nbytes(bucket.sizes)} bytes in bucket {bucket} and has {held[spec]}: places "
                    f"are those of {largest}, which must be the largest on every axis"
                )
