"""Declaration of a parameter, beside its use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from makeready.graphs.recipe import Generated

if TYPE_CHECKING:
    from makeready.graphs.models.family import Model


@dataclass(frozen=True)
class Declaration:
    """What a model says of a parameter besides its shape."""

    source: str | Generated
    shard: int | None
    quantizable: bool


class Parameter(nn.Parameter):
    """A parameter on the meta device that carries its declaration."""

    declaration: Declaration


def parameter(
    shape: tuple[int, ...], source: str, *, shard: int | None = None, quantizable: bool = False
) -> Parameter:
    """A weight of ``shape`` read from the checkpoint tensor ``source`` (Hugging Face spelling)."""
    return _declare(shape, Declaration(source, shard, quantizable))


def constant(shape: tuple[int, ...], function: str, arguments: Mapping[str, Any]) -> Parameter:
    """A float32 tensor that ``graphs.constants.<function>(**arguments)`` computes when a plan is loaded."""
    return _declare(shape, Declaration(Generated(function, dict(arguments)), None, False))


def sources(model: Model) -> set[str]:
    """Tensors of the checkpoint that the parameters of ``model`` are read from."""
    declared = (p.declaration.source for p in model.parameters() if isinstance(p, Parameter))
    return {source for source in declared if isinstance(source, str)}


def _declare(shape: tuple[int, ...], declaration: Declaration) -> Parameter:
    made = Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    made.declaration = declaration
    return made
