"""Declaration of a parameter, beside its use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from makeready.graphs.plan.reads import unrolled
from makeready.graphs.plan.recipe import Derived, Generated, Piece, whole

TENSOR_PARALLEL = "tp"  # the mesh axis that layers are split over
EXPERT_PARALLEL = "ep"  # the one that experts are split over

Shard: TypeAlias = tuple[str | None, ...]
Source: TypeAlias = tuple[Piece, ...] | Generated | Callable[[str], Derived]

if TYPE_CHECKING:
    from makeready.graphs.models.family import Model


@dataclass(frozen=True)
class Declaration:
    """What a model says of a parameter besides its shape.

    Attributes:
        source: pieces, a generator, or what gives a derivation for the dtype that matrices are stored in.
        shard: see :class:`~makeready.graphs.plan.recipe.Param`.
        dtype: what it is stored in; empty for what matrices, or norms and biases, are stored in.
    """

    source: Source
    shard: Shard
    quantizable: bool
    dtype: str = ""


class Parameter(nn.Parameter):
    """A parameter on the meta device that carries its declaration."""

    declaration: Declaration


def parameter(
    shape: tuple[int, ...],
    source: str | Sequence[Piece] | Callable[[str], Derived],
    *,
    shard: Shard = (),
    quantizable: bool = False,
    dtype: str = "",
) -> Parameter:
    """A weight of ``shape``.

    Args:
        source: the checkpoint tensor that it is (Hugging Face spelling), the pieces that it is put together
            of, or a function from the dtype that matrices are stored in to the derivation that makes it.
        shard: the mesh axis that splits each of its axes, ``(TENSOR_PARALLEL, None)``; () for none.
        quantizable: whether quantizations apply. What only wide ops read stays wide; where a checkpoint stores it
            quantized, it is made wide when it is loaded.
        dtype: what it is stored in, where its ops leave no choice.
    """
    said: Source
    if isinstance(source, str):
        said = (whole(source, shape),)
    else:
        said = source if callable(source) else tuple(source)
    return _declare(shape, Declaration(said, shard, quantizable, dtype))


def constant(
    shape: tuple[int, ...], function: str, arguments: Mapping[str, Any], *, dtype: str = "float32"
) -> Parameter:
    """A tensor that ``graphs.constants.<function>(**arguments)`` computes when a plan is loaded."""
    return _declare(shape, Declaration(Generated(function, dict(arguments)), (), False, dtype))


def moved(said: Declaration, prefix: str) -> Declaration:
    """What ``said`` says of a parameter of a model whose checkpoint's tensors have ``prefix`` before their names."""
    source = said.source
    if isinstance(source, tuple):
        source = _moved(source, prefix)
    elif not isinstance(source, Generated):
        source = partial(_derived, source, prefix)
    return replace(said, source=source)


def _moved(pieces: tuple[Piece, ...], prefix: str) -> tuple[Piece, ...]:
    return tuple(replace(piece, source=prefix + piece.source) for piece in pieces)


def _derived(source: Callable[[str], Derived], prefix: str, dtype: str) -> Derived:
    made = source(dtype)
    operands = {n: replace(o, pieces=_moved(o.pieces, prefix)) for n, o in made.by.operands.items()}
    return replace(made, by=replace(made.by, operands=operands))


def sources(model: Model) -> set[str]:
    """Tensors of the checkpoint that the parameters of ``model`` are read from."""
    found: set[str] = set()
    for said in (p.declaration.source for p in model.parameters() if isinstance(p, Parameter)):
        if isinstance(said, Generated):
            continue
        # A derivation reads the same tensors, whatever matrices are stored in.
        pieces = (
            [said] if isinstance(said, tuple) else [o.pieces for o in said("float32").by.operands.values()]
        )
        found |= {read.source for some in pieces for piece in some for read in unrolled(piece)}
    return found


def _declare(shape: tuple[int, ...], declaration: Declaration) -> Parameter:
    made = Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    made.declaration = declaration
    return made
