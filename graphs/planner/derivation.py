"""What a derivation computes: specs of its values, as a whole and cut into units. For planner and CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from makeready.graphs.plan import reads
from makeready.graphs.plan.codec import canonical, to_json
from makeready.graphs.plan.recipe import Derivation, Param
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.signature import ContractError
from makeready.kernels.spec import TensorSpec


def infer(by: Derivation, first: int = 0, stop: int | None = None) -> dict[str, TensorSpec]:
    """Spec of every value when units ``first:stop`` are run; of all of them by default.

    Raises:
        ContractError: a call does not satisfy its contract, or reads what nothing defines.
    """
    cut = by.rows(first, by.units if stop is None else stop)
    specs = {
        name: replace(o.spec, shape=(cut[name][1] - cut[name][0], *o.spec.shape[1:]))
        for name, o in by.operands.items()
    }
    for call in by.calls:
        if call.op not in CONTRACTS:
            raise ContractError(f"{call.op} is no contract")
        missing = [value for value in call.operands.values() if value not in specs]
        if missing:
            raise ContractError(f"{call.op} reads {missing[0]}, which nothing defines")
        given, attrs = CONTRACTS[call.op].bind((), {**call.operands, **call.attrs})
        try:
            made = CONTRACTS[call.op].infer({k: specs[v] for k, v in given.items()}, attrs)
        except (KeyError, ValueError) as error:  # a result of a shape or dtype that there is not
            raise ContractError(f"{call.op}: {error}") from None
        if made.keys() != call.results.keys() or any(value in specs for value in call.results.values()):
            raise ContractError(f"{call.op} gives {sorted(made)}, each under a name of its own")
        specs |= {call.results[k]: spec for k, spec in made.items()}
    return specs


def complaints(param: Param) -> Iterator[str]:
    """What is wrong with a parameter's recipe."""
    ways = [bool(param.pieces), param.generated is not None, param.derived is not None]
    if sum(ways) != 1:
        yield f"{param.name} needs either pieces, a generator or a derivation"
        return
    if param.padding and not param.pieces:
        yield f"{param.name} is padded, but not made of pieces"
        return
    if len(param.shard) not in (0, len(param.spec.shape)):
        yield f"{param.name} has {len(param.spec.shape)} axes, mesh axes are named for {len(param.shard)}"
    for operand in param.operands:
        if reason := reads.complaint(operand):
            yield f"the pieces of {param.name} {reason}"
            return
    if param.derived is None:
        return
    by = param.derived.by
    cut = {-(-int(o.spec.shape[0]) // o.unit) for o in by.operands.values() if o.unit}
    if len(cut) > 1:
        yield f"operands of {param.name} are cut into {' and '.join(map(str, sorted(cut)))} units"
        return
    try:
        made = infer(by).get(param.derived.result)
    except ContractError as error:
        yield f"the derivation of {param.name} is wrong: {error}"
        return
    if made is None or (made.nbytes({}), made.dtype) != (param.spec.nbytes({}), param.spec.dtype):
        yield f"{param.name} is {param.spec}, its derivation gives {made}"
    elif by.units > 1 and not _adds_up(by, param.derived.result, made):
        yield (
            f"{param.name} is another tensor made in parts than made as a whole; give the operands of its "
            "derivation no units"
        )


def _adds_up(by: Derivation, result: str, entire: TensorSpec) -> bool:
    """Whether the first unit and the others give the rows of ``entire``."""
    try:
        first, others = infer(by, 0, 1)[result], infer(by, 1, by.units)[result]
    except ContractError:
        return False
    rows = int(first.shape[0]) + int(others.shape[0])
    return rows == entire.shape[0] and first.shape[1:] == others.shape[1:] == entire.shape[1:]


def derived_groups(params: Sequence[Param]) -> list[tuple[Derivation, dict[str, int]]]:
    """Derivations of ``params``, and the place in ``params`` of each result that is one of them.

    Equal ones come once, unless two parameters are the same result.
    """
    groups: dict[tuple[bytes, int], tuple[Derivation, dict[str, int]]] = {}
    for index, param in enumerate(params):
        if param.derived is None:
            continue
        key = canonical(to_json(param.derived.by))
        for turn in itertools.count():
            _, results = groups.setdefault((key, turn), (param.derived.by, {}))
            if param.derived.result not in results:
                results[param.derived.result] = index
                break
    return list(groups.values())
