"""Graph rewrites: one a file, ``program -> program``, the verifier after each.

:data:`REWRITES` are optional and preserve numerics up to the order of sums inside a matrix product; a plan
may be compiled without any of them and gives the same tokens. ``expand`` is not one of them: it makes the program
of a kind of step out of the general one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from makeready.graphs.passes.fuse_add_norm import fuse_add_norm
from makeready.graphs.passes.fuse_qkv import fuse_qkv
from makeready.graphs.passes.fuse_quantize import fuse_quantize
from makeready.graphs.passes.fuse_silu_mul import fuse_silu_mul
from makeready.graphs.passes.hoist_gather import hoist_gather
from makeready.graphs.passes.merge_linears import merge_linears
from makeready.graphs.planner.ir import Program
from makeready.graphs.planner.verify import verify

REWRITES: Mapping[str, Callable[[Program], Program]] = {
    rewrite.__name__: rewrite
    for rewrite in (
        merge_linears,
        fuse_add_norm,
        fuse_silu_mul,
        fuse_quantize,
        fuse_qkv,
        hoist_gather,
    )
}


def rewrite(program: Program, *, disabled: Collection[str] = ()) -> Program:
    """``program`` after all rewrites but the ``disabled`` ones, in their order.

    Raises:
        ValueError: ``disabled`` names a pass that does not exist.
    """
    unknown = sorted(set(disabled) - set(REWRITES))
    if unknown:
        raise ValueError(f"there is no pass {unknown[0]!r} to disable; passes are {', '.join(REWRITES)}")
    for name, apply in REWRITES.items():
        if name not in disabled:
            program = verify(apply(program), after=name)
    return program
