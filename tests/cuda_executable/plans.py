"""CUDA plans of a tiny model whose kernels are made up, so that no compiler is needed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from fake_driver import cubin

from makeready.graphs import compile as compiler
from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.compile import compile_plan
from makeready.graphs.memory import align
from makeready.graphs.plan import (
    LOAD,
    Binary,
    Choice,
    Launch,
    LoweredProgram,
    Node,
    NodeArgument,
    OpClass,
    Plan,
)
from makeready.graphs.spec import Bucket
from makeready.kernels import registry
from makeready.kernels.spec import DTYPE_BYTES

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
SCRATCH = 4096


def dummy() -> Checkpoint:
    """Random bfloat16 weights of the model."""
    return DummyCheckpoint(dict(CONFIG), None, 0)


def make_plan(checkpoint: Checkpoint | None = None, *, kernels: bool = True, **request: Any) -> Plan:
    """A plan for ``sm_90a``; with ``kernels`` each op class runs one or two made-up ones."""
    request = {
        "max_rows": 4,
        "max_tokens": 32,
        "context_len": 64,
        "page_size": 16,
        "max_logprob_tokens": 8,
        **request,
    }
    saved = compiler._with_kernels, compiler._discover
    compiler._with_kernels = lambda plan, *rest: plan
    compiler._discover = lambda target: registry.discover()
    try:
        plan = compile_plan(checkpoint or dummy(), target="sm_90a", **request)
    finally:
        compiler._with_kernels, compiler._discover = saved
    return with_kernels(plan) if kernels else plan


@cache
def tiny() -> Plan:
    """The plan that most tests use."""
    return make_plan()


def with_kernels(plan: Plan) -> Plan:
    """``plan`` with made-up kernels that take every operand and result, in every form an argument has."""
    binaries: dict[str, Binary] = {}
    cubins: dict[str, bytes] = {}
    programs = {phase: _program(plan, phase, binaries, cubins) for phase in plan.programs}
    loading = plan.loading and replace(plan.loading, program=_loading(plan.loading.program, binaries, cubins))
    memory = replace(plan.memory, scratch=align(SCRATCH))
    return replace(plan, programs=programs, loading=loading, binaries=binaries, cubins=cubins, memory=memory)


def _loading(
    program: LoweredProgram, binaries: dict[str, Binary], cubins: dict[str, bytes]
) -> LoweredProgram:
    """Each launch's kernel takes addresses of operand and results, rows and columns, and its attribute."""
    launches, classes = [], []
    for index, launch in enumerate(program.launches):
        operand = program.buffers[launch.operands["x"]].spec
        names = ("x", "q", "scale")
        numbers = (*operand.at({}), *launch.attrs.values())
        arguments = (
            *(NodeArgument("pointer", operand=name, dtype="bfloat16") for name in names),
            *(NodeArgument("scalar", value=number, dtype="int32") for number in numbers),
        )
        node = _node(arguments, f"{launch.op}_{index}", LOAD, False, binaries, cubins)
        classes.append(OpClass(launch.op, {str(LOAD): (Choice("only", (node,)),)}))
        launches.append(replace(launch, op_class=index))
    return replace(program, launches=tuple(launches), classes=tuple(classes))


def _program(plan: Plan, phase: str, binaries: dict[str, Binary], cubins: dict[str, bytes]) -> LoweredProgram:
    program = plan.programs[phase]
    classes: dict[Any, tuple[int, OpClass]] = {}
    launches = []
    for launch in program.launches:
        values = {**launch.operands, **launch.results}
        key = (launch.op, tuple((k, str(plan.spec(phase, v))) for k, v in values.items()))
        if key not in classes:
            buckets = [b for b in plan.buckets if b.phase == phase]
            candidates = {str(b): _choices(plan, b, launch, len(classes), binaries, cubins) for b in buckets}
            classes[key] = (len(classes), OpClass(launch.op, candidates))
        launches.append(replace(launch, op_class=classes[key][0]))
    return replace(program, launches=tuple(launches), classes=tuple(c for _, c in classes.values()))


def _choices(
    plan: Plan,
    bucket: Bucket,
    launch: Launch,
    index: int,
    binaries: dict[str, Binary],
    cubins: dict[str, bytes],
) -> tuple[Choice, ...]:
    names = [*launch.operands, *launch.results]
    pointers = tuple(NodeArgument("pointer", operand=name, dtype="bfloat16") for name in names)
    rows = NodeArgument("scalar", value=bucket.tokens, dtype="int32")
    scale = NodeArgument("scalar", value=0.125, dtype="float32")
    long = NodeArgument("scalar", value=-(2**40), dtype="int64")
    scratch = NodeArgument("scratch", offset=index * 16, dtype="int32")
    nodes = [_node((scale, *pointers, rows), f"{launch.op}_{index}", bucket, False, binaries, cubins)]
    maps = _maps(plan, bucket, launch)
    if maps:
        arguments, kind, null_pointers = (rows, *maps, long, scratch), "maps", 2
        if index % 2:  # as CUDA C++ has them: maps alone, nothing at the end, the last argument half a word
            arguments = (*(replace(m, kind="map") for m in maps), scratch, rows)
            kind, null_pointers = "source_maps", 0
        name = f"{launch.op}_{index}_{kind}"
        nodes.append(_node(arguments, name, bucket, True, binaries, cubins, null_pointers))
    other = _node((*pointers, scratch), f"{launch.op}_{index}_other", bucket, True, binaries, cubins)
    return Choice("first", tuple(nodes)), Choice("second", (other,))


def _maps(plan: Plan, bucket: Bucket, launch: Launch) -> tuple[NodeArgument, ...]:
    """Maps over weights and caches of a launch."""
    made = []
    parts = {part.name for part in plan.kv.parts}
    for name, value in launch.operands.items():
        spec = plan.spec(bucket.phase, value)
        weight = any(w.param.name == value for w in plan.weights)
        if not ((weight and len(spec.shape) == 2) or value in parts) or DTYPE_BYTES[spec.dtype] != 2:
            continue
        strides = [1]
        for size in spec.shape[:0:-1]:
            strides.insert(0, strides[0] * int(size))
        made.append(
            NodeArgument(
                "descriptor",
                operand=name,
                dtype=spec.dtype,
                shape=spec.shape,
                strides=tuple(strides),
                block=tuple(range(8, 8 + len(spec.shape))),
                swizzle=3,
                element_type=9,
            )
        )
    return tuple(made)


def _node(
    arguments: tuple[NodeArgument, ...],
    name: str,
    bucket: Bucket,
    dependent: bool,
    binaries: dict[str, Binary],
    cubins: dict[str, bytes],
    null_pointers: int = 2,
) -> Node:
    key = f"{bucket.phase}-{name}"
    sizes = [size for argument in arguments for size in argument_sizes(argument)] + [8] * null_pointers
    code = cubin(name, sizes)
    shared = 100_000 if dependent else 1024
    sha256 = hashlib.sha256(code).hexdigest()
    binaries[key] = Binary(name, sha256, 4, shared, 32, 0, dependent, null_pointers)
    cubins[key] = code
    return Node(key, (bucket.rows, bucket.tokens, 2), arguments, dependent)


def argument_sizes(argument: NodeArgument) -> list[int]:
    """Bytes of each parameter that an argument becomes."""
    if argument.kind == "scalar":
        return [np.dtype(argument.dtype).itemsize]
    if argument.kind == "map":
        return [128]
    if argument.kind == "descriptor":
        return [128, *[4] * len(argument.shape), *[8] * len(argument.strides)]
    return [8]
