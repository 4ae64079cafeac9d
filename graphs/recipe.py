"""Where a parameter's bytes come from: the part of a plan that lets it be kept apart from the weights.

A recipe names tensors of the checkpoint in Hugging Face's spelling and where their rows go. A parameter's
shape, shard axis, quantizability and source are declared once, where the model uses it, by
:func:`declare`; merged, sharded and converted parameters are derived from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.kernels.spec import TensorSpec


@dataclass(frozen=True)
class Piece:
    """Rows ``start:stop`` of a checkpoint tensor go to rows ``at:`` of the parameter."""

    source: str
    start: int
    stop: int
    at: int


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
        generated: how it is computed; exactly one of the two is there.
        shard: axis that tensor parallelism splits, or None where every rank holds all of it.
        quantizable: whether quantizations apply.
        layout: ``rows`` (dense, row-major), or the layout that the chosen kernel wants.
    """

    name: str
    spec: TensorSpec
    pieces: tuple[Piece, ...] = ()
    generated: Generated | None = None
    shard: int | None = None
    quantizable: bool = False
    layout: str = "rows"
