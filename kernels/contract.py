"""Op contracts: what an op takes, what it gives, and the plain-torch reference that defines it.

A contract is a function under :func:`contract`. Its signature line names every operand's axes and
dtype; the function body is the specification that each kernel is held to::

    @contract("x[T,K]:A weight[N,K]:W bias?[N]:B -> y[T,N]:A", rowwise="T", flops="2*T*N*K")
    def linear(x, weight, bias=None): ...

In the signature line

* an axis is a name, bound where it is first seen and checked afterwards, or an expression over names
  and attributes (``(heads+2*kv_heads)*head_dim``, ``T*k+c``, ``cdiv(T,64)``), checked in inputs and computed in
  outputs; where a name stands for an axis of the step, so does what is computed from it (kernels/size.py);
* a dtype is a concrete name (``int32``), a variable in capitals, bound like an axis, or
  ``attribute|variable``: the attribute where it is set, else the variable;
* ``?`` marks an optional operand, ``!`` one that the op also writes.

What passes and cost models must know of an op are traits of its contract, see :class:`Contract`; none of them
knows ops by name.

Keyword-only parameters of the function are the op's attributes: constants known when the plan is made.
Called with tensors a contract runs its reference; called with ``torch.fx`` proxies it records itself.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from torch import fx

from makeready.kernels.signature import ContractError, Operand, dtype_of, evaluate, names_in, operand_of
from makeready.kernels.size import Dim
from makeready.kernels.spec import DTYPE_BYTES, TensorSpec

CONTRACTS: dict[str, Contract] = {}
ANY = "*"  # kind of step: those for which nothing else is said
INVARIANT = "="  # kind of step: all of a deterministic plan


@dataclass(frozen=True)
class Tolerance:
    """Largest ``|out - ref| / |ref|`` (Frobenius norms) of a kernel, by the dtype of its output."""

    float32: float = 1e-5
    float16: float = 2e-3
    bfloat16: float = 1e-2
    float8_e4m3fn: float = 5e-2
    int8: float = 2e-2
    uint8: float = 0.0  # of pairs of 4-bit numbers; 0 where bytes are compared as they are
    exact: bool = False  # integers and pure data movement: every element equal


@dataclass(frozen=True)
class Quantizes:
    """The op computes what another does from fewer bits.

    Every operand ``n`` of the other that comes with an operand ``n_scale`` here is quantized; all else of the other
    stays. An attribute ``block`` is the scheme's, ``out_dtype`` the dtype that the other's result has.

    Attributes:
        op: the other's name.
        schemes: the kinds of scheme that make the one of the other (``Scheme.kind`` of graphs/quant).
    """

    op: str
    schemes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Contract:
    """An op: operands, attributes, reference, cost and traits. See the module's docstring and :func:`contract`."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attrs: Mapping[str, Any]
    reference: Callable[..., Any] = field(repr=False)
    tolerance: Tolerance = field(default_factory=Tolerance)
    rowwise: str | None = None
    flops: str = "0"
    traffic: Mapping[str, str] = field(default_factory=dict)
    rate: str | None = None
    view: str | None = None
    selects_rows: str | None = None
    merges: str | None = None
    shares: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    quantizes: Quantizes | None = None
    fuses: tuple[str, str] | None = None
    chains: tuple[str, ...] = ()
    gates: str | None = None
    expands: Mapping[str, Expansion] = field(default_factory=dict, repr=False)
    earlier: tuple[str, ...] = ()

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
            shape = tuple(self._evaluate(axis, dims) for axis in operand.axes)
            outputs[operand.name] = TensorSpec(shape, dtype_of(operand.dtype, dtypes, attrs))
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
            value = self._evaluate(axis, dims)
            if value != dim:
                raise ContractError(
                    f"{self.name}: axis {axis} of {operand.name} is {dim}, it must be {value}"
                )
        return dims, dtypes

    def _evaluate(self, axis: str, names: Mapping[str, Any]) -> Dim:
        try:
            return names[axis] if axis.isidentifier() else evaluate(axis, names)
        except (ContractError, KeyError) as error:
            raise ContractError(f"{self.name}: axis {axis} cannot be computed: {error}") from None


Expansion: TypeAlias = Callable[[Any, Any], "Sequence[Any]"]
"""Of a program (graphs.ir.Program) and one of its calls (graphs.ir.Call): the calls that take its place. They
define what it defines; further values are named after one of those and a dot."""


def contract(
    signature: str,
    *,
    tolerance: Tolerance | None = None,
    rowwise: str | None = None,
    flops: str = "0",
    traffic: Mapping[str, str] | None = None,
    rate: str | None = None,
    view: str | None = None,
    selects_rows: str | None = None,
    merges: str | None = None,
    shares: Sequence[str] = (),
    adds: Sequence[str] = (),
    quantizes: Quantizes | None = None,
    fuses: tuple[str, str] | None = None,
    chains: Sequence[str] = (),
    gates: str | None = None,
    expands: Mapping[str, Expansion] | None = None,
    earlier: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Contract]:
    """Register the decorated reference as the contract of the op that it is named after.

    Args:
        signature: operands and results, as in the module's docstring.
        tolerance: how far a kernel may be from the reference.
        rowwise: axis along which rows neither see each other nor have side effects, so that selecting
            rows commutes with the op.
        flops: floating-point operations, an expression over axis names, attributes and ``context``
            (expected tokens of context a row), with ``min``, ``max``, ``cdiv`` and ``distinct``.
        traffic: elements of an operand that are really moved where that is not all of them (a cache, an
            embedding table, the weights of experts that few tokens reach), by operand name, as such expressions.
        rate: operand whose dtype decides how fast the target multiplies; None where the op does no matrix
            products, and its operations run on the ordinary cores.
        view: attribute that holds the column of the only operand at which the result begins. Such an op moves
            nothing: lowering makes an offset and a stride of it.
        selects_rows: operand of which the op gives, for every row of the batch, one of that row's tokens; the
            other operands say which. Where rows have one token the op is the identity.
        merges: last axis of the result, along which calls on the same input merge into one: what is not shared is
            put together along its first axis, and what each call gave is columns of the result.
        shares: operands that merged calls have in common.
        adds: attributes that merged calls need not have in common: numbers are added, texts joined by ``+``. They say
            how operands are to be read whose first axis is not the merged one.
        quantizes: the op that this one takes the place of under a quantization.
        fuses: names of two ops; this one is the second over one result of the first, with the operands and
            attributes of both and the other results of the first.
        chains: names of ops, each over the first result of the one before as its first operand, and over the second
            where its next operand is the first one's scale (``x``, ``x_scale``). A plan may run calls of them as one
            call of this op in some batch shapes; no program holds it. Its operands are those of the ops in their
            order, without what is passed on, and what one of them writes (a cache) only once; its results the last
            op's, then the further ones of the others in their order; attributes keep their names.
        gates: name of an activation function; this op is it over the left half of its only operand's columns,
            times the right half.
        expands: by kind of step, what the op becomes there; :data:`ANY` for all kinds without an entry,
            :data:`INVARIANT`, or else :data:`ANY`, for all kinds of a deterministic plan. Such an op is never
            lowered.
        earlier: caches of which the op may read what earlier steps have left, before anything of its own step is
            in them.

    Raises:
        TypeError: the signature line, the function and the traits do not fit together.
    """

    def register(reference: Callable[..., Any]) -> Contract:
        name = reference.__name__
        left, right = signature.split("->")
        inputs, outputs = (tuple(operand_of(text) for text in side.split()) for side in (left, right))
        parameters = inspect.signature(reference).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if positional != [o.name for o in inputs]:
            raise TypeError(f"contract {name}: signature names {[o.name for o in inputs]}, code {positional}")
        if name in CONTRACTS:
            raise TypeError(f"contract {name} is declared twice")
        made = Contract(
            name=name,
            inputs=inputs,
            outputs=outputs,
            attrs={p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
            reference=reference,
            tolerance=tolerance or Tolerance(),
            rowwise=rowwise,
            flops=flops,
            traffic=traffic or {},
            rate=rate,
            view=view,
            selects_rows=selects_rows,
            merges=merges,
            shares=tuple(shares),
            adds=tuple(adds),
            quantizes=quantizes,
            fuses=fuses,
            chains=tuple(chains),
            gates=gates,
            expands=expands or {},
            earlier=tuple(earlier),
        )
        for complaint in _contradictions(made):
            raise TypeError(f"contract {name}: {complaint}")
        CONTRACTS[name] = made
        return made

    return register


def _contradictions(op: Contract) -> Iterator[str]:
    """What of an op's traits and expressions does not fit its operands."""
    operands = {o.name: o for o in op.inputs}
    bound = {axis for o in op.inputs for axis in o.axes if axis.isidentifier()} | set(op.attrs)
    for axis in (axis for o in (*op.inputs, *op.outputs) for axis in o.axes):
        for name in sorted(names_in(axis) - bound):
            yield f"the axis {axis} needs {name}, which is neither an axis of an operand nor an attribute"
    for text in (op.flops, *op.traffic.values()):
        for name in sorted(names_in(text) - bound - {"context"}):
            yield f"the cost {text} needs {name}, which is neither an axis of an operand nor an attribute"
    named = {
        "rate": (op.rate,),
        "selects_rows": (op.selects_rows,),
        "shares": op.shares,
        "earlier": op.earlier,
        "traffic": op.traffic,
    }
    for trait, names in named.items():
        for name in names:
            if name is not None and name not in operands:
                yield f"{trait} names {name}, which is no operand"
    if op.rate in operands and operands[op.rate].optional:
        yield f"rate names {op.rate}, which may be absent"
    if op.view is not None and (op.view not in op.attrs or len(op.inputs) != 1 or len(op.outputs) != 1):
        yield "a view has one operand, one result and an attribute that says where the result begins"
    if op.selects_rows is not None and len(op.outputs) != 1:
        yield "selects_rows is for ops with one result"
    for name in op.adds:
        if op.merges is None or name not in op.attrs:
            yield f"adds names {name}, which is no attribute of calls that merge"
    if op.chains:
        yield from _chain_contradictions(op)
    if op.merges is not None:
        if len(op.outputs) != 1 or op.outputs[0].axes[-1] != op.merges:
            yield f"merges names {op.merges}, which is not the last axis of its only result"
        for o in op.inputs:
            along = [op.merges in names_in(axis) for axis in o.axes]
            beside = bool(op.adds) and o.name not in op.shares and not any(along)
            if any(along[1:]) or (any(along) == (o.name in op.shares) and not beside):
                yield f"calls cannot be merged along {op.merges} with {o.name}[{', '.join(o.axes)}]"


def chain_operands(op: Contract) -> list[tuple[int, Operand]]:
    """Operands of a chain in its order, each with the number of the op that it comes from."""
    found: list[tuple[int, Operand]] = []
    for i, name in enumerate(op.chains):
        written = {operand.name for _, operand in found if operand.written}
        inputs = CONTRACTS[name].inputs[passed_on(CONTRACTS[name]) if i else 0 :]
        found += [(i, operand) for operand in inputs if operand.name not in written]
    return found


def passed_on(op: Contract) -> int:
    """How many results of the op before it in a chain ``op`` takes as its first operands."""
    names = [operand.name for operand in op.inputs[:2]]
    return 2 if names[1:] == [f"{names[0]}_scale"] else 1


def _chain_contradictions(op: Contract) -> Iterator[str]:
    """Whether a chain has as many operands and results of each kind, and the attributes, as its ops leave to it."""
    unknown = [name for name in op.chains if name not in CONTRACTS]
    if unknown or len(op.chains) < 2:
        yield f"chains names {unknown[0]}, which is no op" if unknown else "a chain has two ops or more"
        return
    links = [CONTRACTS[name] for name in op.chains]
    inputs = [operand for _, operand in chain_operands(op)]
    further = (o for one, other in pairwise(links) for o in one.outputs[passed_on(other) :])
    outputs = [*links[-1].outputs, *further]
    if [(o.optional, o.written) for o in inputs] != [(o.optional, o.written) for o in op.inputs]:
        yield f"the operands of {', '.join(op.chains)} are {', '.join(o.name for o in inputs)}"
    if len(outputs) != len(op.outputs):
        yield f"the results of {', '.join(op.chains)} are {', '.join(o.name for o in outputs)}"
    attrs = {name for link in links for name in link.attrs}
    if attrs != set(op.attrs):
        yield f"the attributes of {', '.join(op.chains)} are {', '.join(attrs)}"
