"""Whether tables that a plan's recipes make can be made, and are what kernels take them for.

Imports neither torch nor triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.plan.constants import GENERATORS, numbers, zeros
from makeready.graphs.plan.recipe import Param
from makeready.graphs.plan.rules import ContradictionError, need
from makeready.graphs.plan.speculative import MOST_NODES

MOST_ROTARY = 2**16  # columns of a generated table, far above any head


def _numbers(param: Param, said: Mapping[str, Any]) -> None:
    """Tables of a tree of drafts: numbers of nodes, -1 for none, or sets of them."""
    try:
        table = numbers(**said)
    except (TypeError, ValueError, OverflowError):
        raise ContradictionError(f"weight {param.name} is made of {said}, which are no numbers") from None
    need(
        (table.shape, table.dtype.name) == (param.spec.shape, param.spec.dtype),
        f"weight {param.name}, {param.spec}, is made as {table.dtype.name} of {table.shape}",
    )
    least, most = (-1, MOST_NODES - 1) if table.dtype.name == "int32" else (-(2**63), 2**63 - 1)
    need(
        table.size > 0 and least <= table.min() and table.max() <= most,
        f"weight {param.name} has numbers that no node has",
    )


def check_generated(param: Param) -> None:
    """Tables are made of a size that the recipe's arguments say; a first row shows whether it can be made."""
    assert param.generated is not None
    made, said = GENERATORS.get(param.generated.function), dict(param.generated.arguments)
    need(
        made is not None, f"weight {param.name} is made by {param.generated.function!r}, which is no function"
    )
    assert made is not None
    shape, dtype = param.spec.shape, param.spec.dtype
    if made is zeros:
        need(
            said == {"shape": list(shape)} and dtype == "int32",
            f"weight {param.name}, {param.spec}, is made as {said.get('shape')} zeros of int32",
        )
        return
    if made is numbers:
        _numbers(param, said)
        return
    need(
        [said.get("context_len"), said.get("rotary_dim")] == list(shape)
        and 0 < int(shape[-1]) <= MOST_ROTARY,
        f"weight {param.name}, {param.spec}, is made as {said.get('context_len')} x {said.get('rotary_dim')}",
    )
    try:
        row = made(**(said | {"context_len": 1}))
    except Exception as error:  # whatever arguments of any type lead to
        raise ContradictionError(
            f"weight {param.name} cannot be made ({type(error).__name__}: {error})"
        ) from None
    need(row.shape == (1, shape[1]) and dtype == "float32", f"weight {param.name} is made as {row.shape}")
