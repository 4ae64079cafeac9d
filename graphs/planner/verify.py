"""What makes a program legal, as rules; run after tracing and after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

from makeready.graphs.checkpoint.paired import DRAFT
from makeready.graphs.planner.derivation import complaints
from makeready.graphs.planner.ir import KV, PARAM, SLOT, STEP, TEMP, Call, Program, live
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.signature import ContractError


class VerificationError(AssertionError):
    """A pass broke a program: a defect of the pass, never of the user's input."""


def verify(program: Program, *, after: str) -> Program:
    """Return ``program`` if every rule holds of it.

    Raises:
        VerificationError: naming the pass that ran last (``after``), the rule and the call.
    """
    for rule in RULES:
        for complaint in rule(program):
            raise VerificationError(f"after {after}, {rule.__name__}: {complaint}")
    return program


def verify_alike(programs: Mapping[str, Program]) -> None:
    """Check that the programs of all phases make a token's results by the same calls in the same order.

    They may differ in which tokens they run, which rows they select, in views, in results that only some of them
    have, and in what a second model guesses.

    Raises:
        VerificationError: naming the first call in which two phases differ.
    """
    common = set.intersection(*(set(program.results) for program in programs.values()))
    made = {phase: list(_calls_of_a_token(program, common)) for phase, program in programs.items()}
    first, *others = made
    for phase in others:
        for one, other in zip_longest(made[first], made[phase]):
            if one != other:
                raise VerificationError(
                    f"{first} and {phase} compute tokens differently: {one or 'nothing'} against {other or 'nothing'}"
                )


def _calls_of_a_token(
    program: Program, results: set[str]
) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Op, parameters and attributes of the calls that these ``results`` come from."""
    own = _without_drafting(program)
    for call in live(own, {v for k, v in program.results.items() if k in results}):
        op = call.contract
        if op.view is not None or op.selects_rows is not None or _says_what_runs(program, call):
            continue
        params = {k: v for k, v in call.operands.items() if program.values[v].kind == PARAM}
        yield call.op, params, dict(call.attrs)


def drafting(program: Program) -> set[str]:
    """Values that the program makes for nobody but a second model that drafts."""
    kept = live(_without_drafting(program), set(program.results.values()))
    made = {value for call in kept for value in call.results.values()}
    return {value for call in program.calls for value in call.results.values()} - made


def _without_drafting(program: Program) -> list[Call]:
    """The calls that are no model's that drafts: those read its parameters, its cache, or numbers of one another.

    All that others see of them is the integers that they leave behind, which say what runs.
    """
    numbers: set[str] = set()
    kept = []
    for call in program.calls:
        if any(value.startswith(DRAFT) or value in numbers for value in call.operands.values()):
            made = call.results.values()
            numbers |= {value for value in made if program.spec(value).dtype not in ("int32", "int64")}
        else:
            kept.append(call)
    return kept


def _says_what_runs(program: Program, call: Call) -> bool:
    """Whether a call makes integers of integers alone: such ops are exact, whatever a step is."""
    named = (*call.operands.values(), *call.results.values())
    return all(program.spec(value).dtype in ("int32", "int64") for value in named)


def every_op_has_a_contract(program: Program) -> Iterator[str]:
    for call in program.calls:
        if call.op not in CONTRACTS:
            yield f"{call.op} is none"


def calls_meet_their_contracts(program: Program) -> Iterator[str]:
    for call in program.calls:
        try:
            given, attrs = call.contract.bind((), {**call.operands, **call.attrs})
            specs = call.contract.infer({k: program.spec(v) for k, v in given.items()}, attrs)
        except (ContractError, KeyError) as error:
            yield f"{call.op} gives {call.results}: {error}"
            continue
        declared = {k: program.spec(v) for k, v in call.results.items()}
        if declared != specs:
            yield f"{call.op} gives {specs}, the program says {declared}"


def temps_are_defined_once_and_before_use(program: Program) -> Iterator[str]:
    defined = {name for name, value in program.values.items() if value.kind != TEMP}
    for call in program.calls:
        for operand, value in call.operands.items():
            if value not in defined:
                yield f"{call.op} reads {operand}={value} before anything defines it"
        for value in call.results.values():
            if value in defined:
                yield f"{call.op} defines {value} again"
            defined.add(value)
    for result, value in program.results.items():
        if value not in defined:
            yield f"result {result}={value} is never defined"


def only_slots_and_caches_are_written(program: Program) -> Iterator[str]:
    for call in program.calls:
        for operand in call.contract.writes:
            value = program.values[call.operands[operand]]
            if value.kind not in (SLOT, KV):
                yield f"{call.op} writes {value.name}, which is a {value.kind} value"


def caches_are_written_before_they_are_read(program: Program) -> Iterator[str]:
    written: set[str] = set()
    for call in program.calls:
        for operand, value in call.operands.items():
            if program.values[value].kind != KV:
                continue
            if operand in call.contract.writes:
                written.add(value)
            elif value not in written and operand not in call.contract.earlier:
                yield f"{call.op} reads {value} before this step's keys and values are in it"


def sizes_are_of_the_step(program: Program) -> Iterator[str]:
    """Temps grow with what is staged for a step alone, parameters with nothing."""
    staged = {axis for v in program.values.values() if v.kind == STEP for axis in v.spec.axes}
    for name, value in program.values.items():
        known = staged if value.kind == TEMP else frozenset() if value.kind == PARAM else value.spec.axes
        for axis in sorted(value.spec.axes - known):
            yield f"{name} is {value.spec}, and nothing that is staged for the step has an axis {axis}"


def params_have_recipes(program: Program) -> Iterator[str]:
    for name, value in program.values.items():
        if value.kind == PARAM and name not in program.params:
            yield f"{name} has none"
    for param in program.params.values():
        yield from complaints(param)


RULES: tuple[Callable[[Program], Iterator[str]], ...] = (
    every_op_has_a_contract,
    temps_are_defined_once_and_before_use,
    calls_meet_their_contracts,
    sizes_are_of_the_step,
    only_slots_and_caches_are_written,
    caches_are_written_before_they_are_read,
    params_have_recipes,
)
