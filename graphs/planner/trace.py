"""From a model to a program: FX records the contract calls, then shapes are inferred from contracts.

The model runs once on proxies, so its Python is free to loop and to branch on its config, but everything
that touches a tensor must be a contract; any other call is reported with the line that made it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import Parameter
from makeready.graphs.models.family import Model
from makeready.graphs.plan.recipe import Generated, Param
from makeready.graphs.plan.spec import CacheSpec, Field, Limits, StepSpec
from makeready.graphs.planner.derivation import infer
from makeready.graphs.planner.ir import KV, PARAM, SLOT, STEP, TEMP, Call, Program, Value
from makeready.graphs.steps.base import StepKind
from makeready.kernels.contract import Contract
from makeready.kernels.signature import ContractError
from makeready.kernels.spec import TensorSpec

if TYPE_CHECKING:
    from makeready.graphs.planner.request import Request


class TraceError(TypeError):
    """The model's code does something that a program cannot hold."""


def trace(
    model: Model,
    kind: StepKind,
    step: StepSpec,
    limits: Limits,
    request: Request,
    *,
    slots: tuple[Field, ...],
    kv: CacheSpec,
    weight_dtype: str,
    vector_dtype: str,
) -> Program:
    """A whole step of ``kind`` as a program.

    Args:
        model: on the meta device.
        step: the kind's declaration.
        request: what the plan is asked for.
        slots: the slot table.
        kv: the model's cache.
        weight_dtype: dtype that matrices are stored in.
        vector_dtype: dtype that norms and biases are stored in; generated constants are float32.

    Raises:
        TraceError: the model does something that a program cannot hold, or results are not those declared.
    """
    values = {f.name: Value(f.name, f.spec, STEP) for f in step.staged}
    values |= {f.name: Value(f.name, f.spec, SLOT) for f in slots}
    names = list(values)
    values |= {part.name: Value(part.name, part.spec, KV) for part in kv.parts}
    params = {
        name: _param(name, tensor, weight_dtype, vector_dtype) for name, tensor in model.named_parameters()
    }
    values |= {name: Value(name, param.spec, PARAM) for name, param in params.items()}

    tracer = _Tracer(model)
    inputs = Inputs(
        {name: tracer.input(name) for name in names},
        {part.name: tracer.input(part.name) for part in kv.parts},
        kv,
    )
    results = kind.trace(model, inputs, limits, request)
    named = {name: proxy.node.name for name, proxy in results.items()}  # type: ignore[attr-defined]
    program = _program(kind.name, tracer, values, params, named)
    made = {name: program.spec(value) for name, value in program.results.items()}
    declared = {f.name: f.spec for f in step.results}
    if made != declared:
        raise TraceError(f"{kind.name} steps declare the results {declared}, they make {made}")
    return program


class _Tracer(fx.Tracer):
    """An FX tracer that keeps dots in the names of inputs and knows our parameters."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.root = model  # type: ignore[assignment]
        self.graph = fx.Graph(tracer_cls=_Tracer)
        self.tensor_attrs = {}
        self.parameter_names = {id(p): name for name, p in model.named_parameters()}
        self.targets: dict[str, str] = {}

    def input(self, name: str) -> Any:
        """A proxy for the value called ``name``."""
        proxy = self.create_proxy("placeholder", name.replace(".", "_"), (), {})
        self.targets[proxy.node.name] = name
        return proxy

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Parameter):
            node = self.create_node("get_attr", self.parameter_names[id(a)], (), {})
            self.targets[node.name] = self.parameter_names[id(a)]
            return node
        return super().create_arg(a)


def _param(name: str, tensor: torch.nn.Parameter, weight_dtype: str, vector_dtype: str) -> Param:
    assert isinstance(tensor, Parameter)
    said, shape = tensor.declaration, tuple(tensor.shape)
    if isinstance(said.source, Generated):
        return Param(name, TensorSpec(shape, said.dtype), generated=said.source)
    spec = TensorSpec(shape, said.dtype or (weight_dtype if tensor.ndim > 1 else vector_dtype))
    if isinstance(said.source, tuple):
        return Param(name, spec, pieces=said.source, shard=said.shard, quantizable=said.quantizable)
    derived = said.source(weight_dtype)
    made = infer(derived.by).get(derived.result)
    if made is None:
        raise TraceError(f"{name} is {derived.result}, which its derivation does not define")
    spec = TensorSpec(shape, made.dtype)
    return Param(name, spec, derived=derived, shard=said.shard, quantizable=said.quantizable)


def _program(
    phase: str,
    tracer: _Tracer,
    values: dict[str, Value],
    params: Mapping[str, Param],
    results: Mapping[str, str],
) -> Program:
    names = dict(tracer.targets)  # FX node → value
    made: dict[str, Call] = {}  # FX node → its call
    for node in tracer.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.target is operator.getitem:
            owner, index = node.args[0], node.args[1]  # type: ignore[misc]
            names[node.name] = list(made[owner.name].results.values())[index]  # type: ignore[union-attr,index]
            continue
        if not isinstance(node.target, Contract):
            raise TraceError(
                f"model code calls {node.target}, which is no op contract\n{node.stack_trace or ''}"
            )
        call = made[node.name] = _call(node, node.target, names, values)
        if len(call.results) == 1:
            names[node.name] = call.result
    calls = list(made.values())
    returned = {result: names[node] for result, node in results.items()}
    return Program(phase, values, params, tuple(calls), returned).with_calls(calls)


def _call(node: fx.Node, op: Contract, names: Mapping[str, str], values: dict[str, Value]) -> Call:
    operands, attrs = op.bind(node.args, node.kwargs)
    bound = {operand: names[arg.name] for operand, arg in operands.items()}
    try:
        specs = op.infer({k: values[v].spec for k, v in bound.items()}, attrs)
    except ContractError as error:
        raise TraceError(f"{node.name}: {error}") from error
    # A parameter that is read later may be called like the op that made this.
    own = node.name if node.name not in values else f"{node.name}.made"
    results = {k: own if len(specs) == 1 else f"{own}.{k}" for k in specs}
    values |= {results[k]: Value(results[k], spec, TEMP) for k, spec in specs.items()}
    return Call(op.name, bound, results, attrs)
