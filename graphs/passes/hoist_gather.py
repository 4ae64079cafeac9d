"""Only tokens whose logits somebody reads go through the last layers."""

from __future__ import annotations

from makeready.graphs.ir import Call, Program
from makeready.kernels.spec import TOKENS


def hoist_gather(program: Program) -> Program:
    """Move ``gather_last`` up through row-wise ops: ``gather(f(x))`` → ``f(gather(x))``.

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
        if gather.op != "gather_last":
            continue
        source = producers.get(gather.operands["x"])
        if source is None or not _row_wise(program, source):
            continue
        gathers = {v: uses[v] for v in source.results.values() if v not in program.results.values()}
        selection = _selection(gather)
        if len(gathers) == len(source.results) and all(
            g.op == "gather_last" and _selection(g) == selection for found in gathers.values() for g in found
        ):
            return _swap(program, source, selection)
    return None


def _selection(gather: Call) -> tuple[tuple[str, str], ...]:
    return tuple((k, v) for k, v in gather.operands.items() if k != "x")


def _row_wise(program: Program, call: Call) -> bool:
    """Whether the call's operands with a T axis are exactly those that its contract selects rows of."""
    axis = call.contract.rowwise
    return axis is not None and all(
        (o.axes[0] == axis) == (program.spec(call.operands[o.name]).shape[0] == TOKENS)
        for o in call.contract.inputs
        if o.name in call.operands
    )


def _swap(program: Program, source: Call, selection: tuple[tuple[str, str], ...]) -> Program:
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
                        calls.append(Call("gather_last", {"x": wide, **dict(selection)}, {"y": narrow}))
            calls.append(Call(source.op, operands, source.results, source.attrs))
        elif call.op == "gather_last" and call.operands["x"] in source.results.values():
            renamed[call.result] = call.operands["x"]
        elif call.op == "gather_last" and defined(call.result):
            continue  # an earlier reader of the same value has just gathered it
        else:
            calls.append(call.renamed(renamed))
    results = {k: renamed.get(v, v) for k, v in program.results.items()}
    return Program(program.phase, program.values, program.params, (), results).with_calls(calls)
