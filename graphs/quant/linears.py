"""What rewrites of linears have in common: which calls they may replace, and what a weight is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.recipe import Operand, Param
from makeready.graphs.planner.ir import PARAM, Call, Program
from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.spec import TensorSpec


def quantized_ops(kind: str) -> dict[str, Contract]:
    """What takes the place of an op under schemes of this kind, by the op's name."""
    known = (op for op in CONTRACTS.values() if op.quantizes is not None and kind in op.quantizes.schemes)
    return {op.quantizes.op: op for op in known if op.quantizes is not None}


def wide_sources(program: Program, ops: Mapping[str, Contract]) -> set[str]:
    """Tensors of the checkpoint that ops read which nothing takes the place of, such as tied embeddings."""
    params = (program.params.get(v) for c in program.calls if c.op not in ops for v in c.operands.values())
    operands = (operand for param in params if param is not None for operand in param.operands)
    return {piece.source for operand in operands for piece in operand.pieces}


def quantized_operands(call: Call, op: Contract, program: Program) -> tuple[str, str]:
    """The activation and the weight among the operands of ``call`` that have scales in ``op``, or empty for none."""
    names = {o.name for o in op.inputs}
    scaled = [name for name in call.operands if scale_of(name) in names]
    weights = [name for name in scaled if program.values[call.operands[name]].kind == PARAM]
    activations = [name for name in scaled if name not in weights]
    return activations[0] if activations else "", weights[0] if weights else ""


def refuse_lost(call: Call, op: Contract, module: str) -> None:
    """Check that ``op`` takes all operands of the call whose place it takes.

    Raises:
        PlanError: it lacks one, such as the bias of an expert.
    """
    for name in call.operands.keys() - {o.name for o in op.inputs}:
        raise PlanError(
            f"{module} has a {name}, which {op.name} does not take; compile without quant, "
            "or use a checkpoint that stores it in 16 bits or MXFP4"
        )


def scale_of(operand: str) -> str:
    """What an operand's scale is called."""
    return f"{operand}_scale"


def module_of(source: str) -> str:
    """The module that a weight of this name belongs to in the checkpoint."""
    return source.removesuffix(".weight")


def as_matrix(param: Param) -> Operand:
    """What a parameter is put together of, as a matrix: those that are stacked lie one below the other."""
    *stacked, rows, width = (int(n) for n in param.spec.shape)
    if not stacked:
        return Operand(param.spec, param.pieces)
    (count,) = stacked

    def flat(place: tuple[int, ...]) -> tuple[int, ...]:
        return (place[0] * rows + place[1], place[2]) if place else ()

    pieces = tuple(
        replace(p, at=flat(p.at), each=tuple(replace(e, place=flat(e.place)) for e in p.each))
        for p in param.pieces
    )
    return Operand(TensorSpec((count * rows, width), param.spec.dtype), pieces)
