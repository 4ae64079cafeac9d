"""Op contracts: what an op takes, what it gives, and the plain-torch reference that defines it.

A contract is a function under :func:`contract`. Its signature line names every operand's axes and
dtype; the function body is the specification that each kernel is held to::

    @contract("x[T,K]:A weight[N,K]:W bias?[N]:B -> y[T,N]:A", rowwise="T", flops="2*T*N*K")
    def linear(x, weight, bias=None): ...

In the signature line

* an axis is a name, bound where it is first seen and checked afterwards, or an expression over names
  and attributes (``(heads+2*kv_heads)*head_dim``), checked in inputs and computed in outputs;
* a dtype is a concrete name (``int32``), a variable in capitals, bound like an axis, or
  ``attribute|variable``: the attribute where it is set, else the variable;
* ``?`` marks an optional operand, ``!`` one that the op also writes.

Keyword-only parameters of the function are the op's attributes: constants known when the plan is made.
Called with tensors a contract runs its reference; called with ``torch.fx`` proxies it records itself.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from makeready.kernels.spec import DTYPE_BYTES, Dim, TensorSpec

CONTRACTS: dict[str, Contract] = {}

_OPERAND = re.compile(r"(?P<name>\w+)(?P<mark>[?!]?)\[(?P<axes>[^\]]*)\]:(?P<dtype>[\w|]+)")


class ContractError(TypeError):
    """A call does not satisfy its op's contract."""


@dataclass(frozen=True)
class Operand:
    """One tensor of a contract: axes and dtype as written in the signature line."""

    name: str
    axes: tuple[str, ...]
    dtype: str
    optional: bool = False
    written: bool = False


@dataclass(frozen=True)
class Tolerance:
    """Largest ``|out - ref| / |ref|`` (Frobenius norms) of a kernel, by the dtype of its output."""

    float32: float = 1e-5
    float16: float = 2e-3
    bfloat16: float = 1e-2
    float8_e4m3fn: float = 5e-2
    exact: bool = False  # integers and pure data movement: every element equal


@dataclass(frozen=True, eq=False)
class Contract:
    """An op: operands, attributes, reference and cost. See the module's docstring."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attrs: Mapping[str, Any]
    reference: Callable[..., Any] = field(repr=False)
    tolerance: Tolerance = field(default_factory=Tolerance)
    rowwise: str | None = None
    flops: str = "0"
    traffic: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer = next((a.tracer for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)
        if tracer is None:
            return self.reference(*args, **kwargs)
        proxy = tracer.create_proxy("call_function", self, args, kwargs, name=self.name)
        if len(self.outputs) == 1:
            return proxy
        return tuple(operator.getitem(proxy, i) for i in range(len(self.outputs)))  # type: ignore[arg-type]

    @property
    def __name__(self) -> str:  # torch.fx names nodes after their target
        return self.name

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the input operands that the op writes in place."""
        return tuple(o.name for o in self.inputs if o.written)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split a call's arguments into operands (absent optionals left out) and attributes."""
        names = [o.name for o in self.inputs]
        if len(args) > len(names):
            raise ContractError(f"{self.name} takes {len(names)} operands, {len(args)} were given")
        given = dict(zip(names, args, strict=False))
        attrs = dict(self.attrs)
        for key, value in kwargs.items():
            if key in attrs:
                attrs[key] = value
            elif key in names and key not in given:
                given[key] = value
            else:
                raise ContractError(f"{self.name} has no operand or attribute {key!r}")
        for operand in self.inputs:
            if given.get(operand.name) is None:
                if not operand.optional:
                    raise ContractError(f"{self.name} lacks operand {operand.name!r}")
                given.pop(operand.name, None)
        missing = [k for k, v in attrs.items() if v is inspect.Parameter.empty]
        if missing:
            raise ContractError(f"{self.name} lacks attribute {missing[0]!r}")
        return given, attrs

    def infer(self, operands: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Check the operands against the signature line and return the outputs' specs, by name."""
        dims, dtypes = self._solve(operands, attrs)
        outputs = {}
        for operand in self.outputs:
            shape = tuple(_evaluate(axis, dims) for axis in operand.axes)
            outputs[operand.name] = TensorSpec(shape, _dtype(operand.dtype, dtypes, attrs))
        return outputs

    def dims(self, operands: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> dict[str, Any]:
        """Values of every axis name and numeric attribute, as used in ``flops`` and ``traffic``."""
        return self._solve(operands, attrs)[0]

    def _solve(
        self, operands: Mapping[str, TensorSpec], attrs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        dims: dict[str, Any] = {k: v for k, v in attrs.items() if isinstance(v, int | float)}
        dtypes: dict[str, str] = {}
        deferred: list[tuple[Operand, str, Dim]] = []
        for operand in self.inputs:
            spec = operands.get(operand.name)
            if spec is None:
                continue
            if len(spec.shape) != len(operand.axes):
                raise ContractError(
                    f"{self.name}: {operand.name} is {spec}, the contract wants [{', '.join(operand.axes)}]"
                )
            for axis, dim in zip(operand.axes, spec.shape, strict=True):
                if not axis.isidentifier():
                    deferred.append((operand, axis, dim))
                elif dims.setdefault(axis, dim) != dim:
                    raise ContractError(
                        f"{self.name}: axis {axis} of {operand.name} is {dim}, it was {dims[axis]} before"
                    )
            want = operand.dtype
            bound = dtypes.setdefault(want, spec.dtype) if want not in DTYPE_BYTES else want
            if bound != spec.dtype:
                raise ContractError(
                    f"{self.name}: {operand.name} is {spec.dtype}, the contract wants {bound}"
                )
        for operand, axis, dim in deferred:
            value = _evaluate(axis, dims)
            if value != dim:
                raise ContractError(
                    f"{self.name}: axis {axis} of {operand.name} is {dim}, it must be {value}"
                )
        return dims, dtypes


def contract(
    signature: str,
    *,
    tolerance: Tolerance | None = None,
    rowwise: str | None = None,
    flops: str = "0",
    traffic: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Contract]:
    """Register the decorated reference as the contract of the op that it is named after.

    Args:
        signature: operands and results, as in the module's docstring.
        tolerance: how far a kernel may be from the reference.
        rowwise: axis along which rows neither see each other nor have side effects, so that selecting
            rows commutes with the op.
        flops: floating-point operations, an expression over axis names, attributes and ``context``
            (expected tokens of context a row).
        traffic: elements of an operand that are really moved where that is not all of them (a cache, an
            embedding table), by operand name, as such expressions.
    """

    def register(reference: Callable[..., Any]) -> Contract:
        name = reference.__name__
        left, right = signature.split("->")
        inputs, outputs = (tuple(_operand(text) for text in side.split()) for side in (left, right))
        parameters = inspect.signature(reference).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if positional != [o.name for o in inputs]:
            raise TypeError(f"contract {name}: signature names {[o.name for o in inputs]}, code {positional}")
        if name in CONTRACTS:
            raise TypeError(f"contract {name} is declared twice")
        CONTRACTS[name] = Contract(
            name=name,
            inputs=inputs,
            outputs=outputs,
            attrs={p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
            reference=reference,
            tolerance=tolerance or Tolerance(),
            rowwise=rowwise,
            flops=flops,
            traffic=traffic or {},
        )
        return CONTRACTS[name]

    return register


def _operand(text: str) -> Operand:
    match = _OPERAND.fullmatch(text)
    if match is None:
        raise TypeError(f"cannot read operand {text!r}; write name[axes]:dtype")
    axes = tuple(axis for axis in match["axes"].split(",") if axis)
    return Operand(match["name"], axes, match["dtype"], match["mark"] == "?", match["mark"] == "!")


def _dtype(rule: str, bound: Mapping[str, str], attrs: Mapping[str, Any]) -> str:
    attribute, _, variable = rule.rpartition("|")
    if attribute and attrs[attribute]:
        return attrs[attribute]
    return variable if variable in DTYPE_BYTES else bound[variable]


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """Value of an arithmetic expression of a contract (``+ - * // / %`` over names and numbers)."""
    return _walk(ast.parse(expression, mode="eval").body, names)


def _evaluate(axis: str, names: Mapping[str, Any]) -> Dim:
    return names[axis] if axis.isidentifier() else evaluate(axis, names)


_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Div: lambda a, b: a / b,
    ast.Mod: lambda a, b: a % b,
}


def _walk(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_walk(node.left, names), _walk(node.right, names))
    raise ContractError(f"contracts compute with + - * // / % only, not {ast.dump(node)}")
