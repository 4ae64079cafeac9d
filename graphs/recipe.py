"""Where a parameter's bytes come from: the part of a plan that lets it be kept apart from the weights.

A recipe names tensors of the checkpoint in Hugging Face's spelling and where their rows go. A parameter's
shape, shard axis, quantizability and source are declared once, where the model uses it
(graphs/layers/parameter.py); merged, quantized, sharded and converted parameters are derived from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from makeready.kernels.spec import TensorSpec


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` of a checkpoint tensor go to rows ``at:`` of what is assembled.

    Attributes:
        repeated: the tensor is a single number, which each of the rows takes.
    """

    source: str
    start: int
    stop: int
    at: int
    repeated: bool = False


@dataclass(frozen=True)
class Generated:
    """A constant that the loader computes: a function of ``graphs.constants`` and its arguments."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Derived:
    """A parameter that is one result of an op over what its pieces assemble.

    Parameters with the same pieces, op and attributes are results of one call (a weight and its scale).

    Attributes:
        op, attrs, result: the contract, its attributes and the name of its result.
        operand: spec of what the pieces assemble: the op's only operand.
    """

    op: str
    attrs: Mapping[str, Any]
    result: str
    operand: TensorSpec


@dataclass(frozen=True)
class Param:
    """A tensor in the plan's weights region.

    Attributes:
        name: unique in the plan.
        spec: shape and the dtype it is stored in.
        pieces: what it is put together from, or
        generated: how it is computed; exactly one of the two is there.
        derived: what is done to what the pieces assemble; None where that is the parameter itself.
        largest: the pieces are numbers, and the parameter is the largest of them.
        columns: of the pieces' rows, where the parameter's are longer: the rest of them is zero.
        shard: axis that tensor parallelism splits, or None where every rank holds all of it.
        quantizable: whether quantizations apply.
        layout: ``rows`` (dense, row-major), or the layout that the chosen kernel wants.
    """

    name: str
    spec: TensorSpec
    pieces: tuple[Piece, ...] = ()
    generated: Generated | None = None
    derived: Derived | None = None
    largest: bool = False
    columns: int | None = None
    shard: int | None = None
    quantizable: bool = False
    layout: str = "rows"

    @property
    def assembled(self) -> TensorSpec:
        """Spec of what the pieces are put together to."""
        return self.derived.operand if self.derived is not None else self.spec

    def source_shape(self, piece: Piece) -> tuple[int, ...]:
        """Least shape of a piece's tensor; more rows may follow."""
        if piece.repeated:
            return (1,)
        return (piece.stop, *((self.columns,) if self.columns else self.assembled.at({})[1:]))

    def fits(self, piece: Piece, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of ``shape`` can be a piece's source; axes of length 1 behind the first do not
        count, since scales come as ``[N]`` and as ``[N, 1]``.
        """
        if piece.repeated:
            return math.prod(shape) == 1
        least = self.source_shape(piece)
        return bool(shape) and shape[0] >= least[0] and _without_ones(shape[1:]) == _without_ones(least[1:])


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def joined(names: Sequence[str]) -> str:
    """One name for several: ``a.q.weight``, ``a.k.weight`` → ``a.q+k.weight``."""
    paths = [name.split(".") for name in names]
    if len({len(path) for path in paths}) > 1:
        return "+".join(names)
    columns = zip(*paths, strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else "+".join(parts) for parts in columns)


def concatenate(params: Sequence[Param]) -> Param:
    """One parameter with the rows of all, in order; all alike but for their rows."""
    first, pieces, assembled, rows = params[0], [], 0, 0
    for param in params:
        pieces += [replace(piece, at=piece.at + assembled) for piece in param.pieces]
        assembled += int(param.assembled.shape[0])
        rows += int(param.spec.shape[0])
    derived = first.derived
    if derived is not None:
        derived = replace(derived, operand=_with_rows(derived.operand, assembled))
    name, spec = joined([p.name for p in params]), _with_rows(first.spec, rows)
    return replace(first, name=name, spec=spec, pieces=tuple(pieces), derived=derived)


def _with_rows(spec: TensorSpec, rows: int) -> TensorSpec:
    return replace(spec, shape=(rows, *spec.shape[1:]))
