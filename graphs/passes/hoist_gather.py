"""Only tokens whose logits somebody reads go through the last layers."""

from __future__ import annotations

from makeready.graphs.planner.ir import Call, Program
from makeready.kernels.size import axis_of


def hoist_gather(program: Program) -> Program:
    """Move ops that select rows (``gather_last``) up through row-wise ones: ``gather(f(x))`` → ``f(gather(x))``.

    An op whose contract is row-wise computes every row by itself, so selecting rows commutes with it as
    long as nobody else reads its unselected results. The gather starts at the logits and stops at the last
    layer's attention: the vocabulary projection, the final norm and the last MLP see R rows instead of T.
    """
    while (moved := _hoist_one(program)) is not None:
        program = moved
    return program


def _hoist_one(program: Program) -> Program | None:
    producers, uses = program.producers(), program.uses()
    for gather in program.calls:
        if gather.contract.selects_rows is None:
            continue
        source = producers.get(_wide(gather))
        if source is None or not _row_wise(program, source, gather):
            continue
        gathers = {v: uses[v] for v in source.results.values() if v not in program.results.values()}
        if len(gathers) == len(source.results) and all(
            _alike(g, gather) and _wide(g) == v for v, found in gathers.items() for g in found
        ):
            return _swap(program, source, gather)
    return None


def _wide(gather: Call) -> str:
    """The value that rows are selected of."""
    return gather.operands[gather.contract.selects_rows or ""]


def _gather(gather: Call, wide: str, narrow: str) -> Call:
    """The same selection of another value."""
    operands = {**gather.operands, gather.contract.selects_rows or "": wide}
    return Call(gather.op, operands, dict.fromkeys(gather.results, narrow), gather.attrs)


def _alike(call: Call, gather: Call) -> bool:
    """Whether ``call`` selects what ``gather`` does, of whatever value."""
    return call.op == gather.op and _gather(call, "", "") == _gather(gather, "", "")


def _row_wise(program: Program, call: Call, gather: Call) -> bool:
    """Whether the call computes rows by themselves, and those that are selected are all that it has of their axis."""
    along, wide = call.contract.rowwise, program.spec(_wide(gather)).shape[0]
    if along is None or any(o.axes[0] != along for o in call.contract.outputs):
        return False
    shapes = {
        o: program.spec(call.operands[o.name]).shape for o in call.contract.inputs if o.name in call.operands
    }
    return all(
        (o.axes[0] == along) == (shape[0] == wide)
        and not any(axis_of(d) == axis_of(wide) is not None for d in shape[shape[0] == wide :])
        for o, shape in shapes.items()
    )


def _swap(program: Program, source: Call, gather: Call) -> Program:
    """Gather the operands of ``source`` instead of its results."""
    axis = source.contract.rowwise
    renamed: dict[str, str] = {}  # result of an old gather → the row-wise op's own, now of R rows
    calls: list[Call] = []

    def defined(value: str) -> bool:
        return any(value in c.results.values() for c in calls)

    for call in program.calls:
        if call is source:
            operands = dict(source.operands)
            for operand in source.contract.inputs:
                if operand.axes[0] == axis and operand.name in operands:
                    wide = operands[operand.name]
                    operands[operand.name] = narrow = f"{wide}.last"
                    if not defined(narrow):
                        calls.append(_gather(gather, wide, narrow))
            calls.append(Call(source.op, operands, source.results, source.attrs))
        elif _alike(call, gather) and _wide(call) in source.results.values():
            renamed[call.result] = _wide(call)
        elif _alike(call, gather) and defined(call.result):
            continue  # an earlier reader of the same value has just gathered it
        else:
            calls.append(call.renamed(renamed))
    results = {k: renamed.get(v, v) for k, v in program.results.items()}
    return Program(program.phase, program.values, program.params, (), results).with_calls(calls)
