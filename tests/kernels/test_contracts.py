"""Every op contract: what its signature line infers is what its reference does."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from case import Case, spec_of
from inputs import BUILDERS, cases

from makeready.kernels import contract as contracts
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS, Tolerance, contract
from makeready.kernels.signature import ContractError, evaluate
from makeready.kernels.spec import DTYPE_BYTES, PAGES, ROWS, TOKENS, TensorSpec

registry.discover()
OPS = sorted(CONTRACTS)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def first(op: str) -> Case:
    return next(cases(op))


def test_every_op_has_inputs_and_every_input_an_op():
    assert set(BUILDERS) == set(OPS)
    with pytest.raises(LookupError, match="add a builder"):
        cases("no_such_op")


@pytest.mark.parametrize("op", OPS)
def test_inferred_results_are_the_references(op):
    for case in cases(op):
        inferred = case.contract.infer(case.specs(), case.attrs)
        made = {k: v for k, v in case.run().items() if k in inferred or k not in case.operands}
        assert {k: spec_of(v) for k, v in made.items() if v is not None} == inferred, case.label
        assert set(inferred) == {o.name for o in case.contract.outputs}


@pytest.mark.parametrize("op", OPS)
def test_only_written_operands_change(op):
    for case in cases(op):
        before = {k: v.clone() for k, v in case.operands.items()}
        arguments = [case.operands.get(o.name) for o in case.contract.inputs]
        case.contract.reference(*arguments, **case.attrs)
        for name in set(before) - set(case.contract.writes):
            assert torch.equal(bits(before[name]), bits(case.operands[name])), name


@pytest.mark.parametrize("op", OPS)
def test_symbolic_shapes_infer_what_their_sizes_do(op):
    """A program's specs hold T, R and P; filling them in afterwards or before is the same."""
    case = first(op)
    sizes: dict[str, int] = {}
    symbolic = {}
    for operand in case.contract.inputs:
        if operand.name in case.operands:
            spec = case.specs()[operand.name]
            shape = tuple(
                axis if axis in (TOKENS, ROWS, PAGES) else dim
                for axis, dim in zip(operand.axes, spec.shape, strict=True)
            )
            sizes |= {a: int(d) for a, d in zip(shape, spec.shape, strict=True) if isinstance(a, str)}
            symbolic[operand.name] = TensorSpec(shape, spec.dtype)
    made = case.contract.infer(symbolic, case.attrs)
    concrete = case.contract.infer(case.specs(), case.attrs)
    assert {k: v.at(sizes) for k, v in made.items()} == {k: v.shape for k, v in concrete.items()}


def _constrained(case: Case, name: str, axis: str) -> bool:
    """Whether the contract can know how long the axis has to be."""
    elsewhere = [
        other
        for operand in case.contract.inputs
        if operand.name in case.operands
        for at, other in enumerate(operand.axes)
        if (operand.name, at) != (name, case_axis(case, name, axis))
    ]
    return not axis.isidentifier() or axis in case.attrs or axis in elsewhere


def case_axis(case: Case, name: str, axis: str) -> int:
    return next(o for o in case.contract.inputs if o.name == name).axes.index(axis)


@pytest.mark.parametrize("op", OPS)
def test_wrong_shapes_and_dtypes_are_refused(op):
    case = first(op)
    specs = case.specs()
    for operand in case.contract.inputs:
        if operand.name not in specs:
            continue
        spec = specs[operand.name]
        for wrong in (replace(spec, shape=(*spec.shape, 1)), replace(spec, shape=spec.shape[1:])):
            with pytest.raises(ContractError, match=operand.name):
                case.contract.infer(specs | {operand.name: wrong}, case.attrs)
        for at, axis in enumerate(operand.axes):
            if _constrained(case, operand.name, axis):
                shape = (*spec.shape[:at], int(spec.shape[at]) + 1, *spec.shape[at + 1 :])
                with pytest.raises(ContractError, match="axis"):
                    case.contract.infer(specs | {operand.name: replace(spec, shape=shape)}, case.attrs)
        peers = [o for o in case.contract.inputs if o.dtype == operand.dtype and o.name in specs]
        if operand.dtype in DTYPE_BYTES or len(peers) > 1:
            other = "uint8" if spec.dtype == "int8" else "int8"
            with pytest.raises(ContractError, match="wants"):
                case.contract.infer(specs | {operand.name: replace(spec, dtype=other)}, case.attrs)


@pytest.mark.parametrize("op", OPS)
def test_missing_and_unknown_arguments_are_refused(op):
    case = first(op)
    bind = case.contract.bind
    arguments: dict = {**case.operands, **case.attrs}
    operands, attrs = bind((), arguments)
    assert set(operands) == set(case.operands)
    assert set(attrs) == set(case.contract.attrs)
    for operand in case.contract.inputs:
        without = {k: v for k, v in arguments.items() if k != operand.name}
        if operand.optional:
            assert operand.name not in bind((), without)[0]
            assert operand.name not in bind((), {**without, operand.name: None})[0]
        else:
            with pytest.raises(ContractError, match=f"lacks operand '{operand.name}'"):
                bind((), without)
    for name, default in case.contract.attrs.items():
        without = {k: v for k, v in arguments.items() if k != name}
        if default is inspect.Parameter.empty:
            with pytest.raises(ContractError, match=f"lacks attribute '{name}'"):
                bind((), without)
        else:
            assert bind((), without)[1][name] == default
    with pytest.raises(ContractError, match="no operand or attribute 'colour'"):
        bind((), {**arguments, "colour": 1})
    with pytest.raises(ContractError, match="operands"):
        bind([None] * (len(case.contract.inputs) + 1), {})
    with pytest.raises(ContractError, match="no operand or attribute"):
        bind([next(iter(case.operands.values()))], arguments)


@pytest.mark.parametrize("op", OPS)
def test_costs_can_be_computed(op):
    case = first(op)
    names = case.contract.dims(case.specs(), case.attrs) | {"context": 100, "T": 4, "R": 2}
    assert evaluate(case.contract.flops, names) >= 0
    assert set(case.contract.traffic) <= {o.name for o in case.contract.inputs}
    assert all(evaluate(text, names) > 0 for text in case.contract.traffic.values())


@pytest.mark.parametrize("op", [op for op in OPS if CONTRACTS[op].rowwise])
def test_rowwise_ops_commute_with_selecting_rows(op):
    """What hoist_gather relies on."""
    assert not CONTRACTS[op].writes
    for case in list(cases(op))[:12]:
        axis = case.contract.rowwise
        by_row = {o.name for o in case.contract.inputs if o.axes[0] == axis and o.name in case.operands}
        rows = len(case.operands[min(by_row)])
        chosen = torch.tensor([rows - 1, 0, rows // 2, 0])
        selected = {k: v[chosen] if k in by_row else v for k, v in case.operands.items()}
        made = replace(case, operands=selected).run()
        for name, whole in case.run().items():
            some, same = (x.float() if x.itemsize == 1 else x for x in (made[name], whole[chosen]))
            # Sums of large products that nearly cancel differ by what is small beside their neighbours.
            largest = float(same.nan_to_num(posinf=0, neginf=0).abs().max()) if same.numel() else 0.0
            torch.testing.assert_close(some, same, rtol=1e-5, atol=1e-5 * max(1.0, largest), equal_nan=True)


def test_signatures_that_say_something_else_than_the_code_are_refused(monkeypatch):
    monkeypatch.setattr(contracts, "CONTRACTS", {})

    def twice(x: torch.Tensor, *, by: int = 2) -> torch.Tensor:
        return x * by

    with pytest.raises(TypeError, match="cannot read operand 'x\\[T'"):
        contract("x[T -> y[T]:A")(twice)
    with pytest.raises(TypeError, match="signature names"):
        contract("z[T]:A -> y[T]:A")(twice)
    made = contract("x[T]:A -> y[T*by]:A", tolerance=Tolerance(exact=True))(twice)
    assert made.infer({"x": TensorSpec((3,), "int32")}, {"by": 2})["y"] == TensorSpec((6,), "int32")
    with pytest.raises(TypeError, match="declared twice"):
        contract("x[T]:A -> y[T]:A")(twice)


@pytest.mark.parametrize("text", ["a**b", "f(a)", "a if a else b", "-a"])
def test_expressions_compute_nothing_else(text):
    with pytest.raises(ContractError, match=r"\+ - \*"):
        evaluate(text, {"a": 1, "b": 2})
