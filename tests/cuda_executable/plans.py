"""CUDA plans of a tiny model whose kernels are made up, so that no compiler is needed."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from fake_objects import FakeNode, cubin

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.cuda.driver import host_bytes
from makeready.graphs.plan.memory import align
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import (
    APART,
    Binary,
    Launch,
    LoadProgram,
    LoweredProgram,
    Node,
    NodeArgument,
    OpClass,
    PlanCandidate,
)
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.planner import compile as compiler
from makeready.graphs.planner.compile import compile_plan
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.spec import DTYPE_BYTES, TensorSpec

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
    loading = plan.loading and replace(
        plan.loading, programs=tuple(_loading(load, binaries, cubins) for load in plan.loading.programs)
    )
    lanes = 2 if any(program.lanes for program in plan.programs.values()) else 1
    half = align(SCRATCH)
    memory = replace(plan.memory, scratch=lanes * half, side_scratch=(lanes - 1) * half)
    return replace(plan, programs=programs, loading=loading, binaries=binaries, cubins=cubins, memory=memory)


def chained() -> Plan:
    """:func:`tiny`, whose buckets of one row run each norm and its projection as one dependent kernel; the launch at
    place 2 of decode steps joins all before it.
    """
    plan, program = tiny(), make_plan(kernels=False).programs["decode"]
    bucket = next(b for b in plan.buckets if (b.phase, b.rows) == ("decode", 1))
    binaries, cubins, classes, chains = (
        dict(plan.binaries),
        dict(plan.cubins),
        list(plan.programs["decode"].classes),
        [],
    )
    for chain in (c for c in program.chains if c.launch.op.endswith("_linear")):
        names = [*chain.launch.operands, *chain.launch.results]
        arguments = tuple(NodeArgument("pointer", operand=name, dtype="bfloat16") for name in names)
        node = _node(arguments, f"chain_{len(classes)}", bucket, True, binaries, cubins)
        chains.append(replace(chain, launch=replace(chain.launch, op_class=len(classes))))
        classes.append(
            OpClass(chain.launch.op, {str(bucket): (PlanCandidate("one", (node,)), PlanCandidate(APART, ()))})
        )
    decode = replace(plan.programs["decode"], classes=tuple(classes), chains=tuple(chains), joins=(2,))
    programs = {**plan.programs, "decode": decode}
    return replace(plan, programs=programs, binaries=binaries, cubins=cubins)


def _loading(load: LoadProgram, binaries: dict[str, Binary], cubins: dict[str, bytes]) -> LoadProgram:
    """Each launch's kernel takes the addresses of its operands and results, in order; see :class:`Loader`."""
    launches, classes = [], []
    for index, launch in enumerate(load.program.launches):
        names = [*launch.operands, *launch.results]
        arguments = tuple(NodeArgument("pointer", operand=name, dtype="uint8") for name in names)
        node = _node(
            arguments, f"{load.bucket.phase}-{launch.op}-{index}", load.bucket, False, binaries, cubins
        )
        classes.append(OpClass(launch.op, {str(load.bucket): (PlanCandidate("only", (node,)),)}))
        launches.append(replace(launch, op_class=index))
    return replace(load, program=replace(load.program, launches=tuple(launches), classes=tuple(classes)))


class Loader:
    """Does in the fake's memory what the kernels of load programs are called after, by the ops' references.

    Attributes:
        plan: whose kernels they are; set it before they run.
        launched: how often each kernel ran.
        operands: addresses that were read.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.launched: Counter[str] = Counter()
        self.operands: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, node: FakeNode) -> None:
        assert self.plan is not None
        assert self.plan.loading is not None
        phase, launch_name = node.function.name.split("-", 1)
        load = next(p for p in self.plan.loading.programs if p.program.phase == phase)
        launch = load.program.launches[int(launch_name.rpartition("-")[2])]
        addresses = dict(zip([*launch.operands, *launch.results], node.words(), strict=False))
        specs = {name: buffer.spec for name, buffer in load.program.buffers.items()}
        specs |= {result.name: result.spec for result in load.results.values()}
        with self._lock:
            self.launched[node.function.name] += 1
            self.operands |= {addresses[name] for name in launch.operands}
        op = CONTRACTS[launch.op]
        given = [
            _tensor(addresses[o.name], specs[launch.operands[o.name]]) if o.name in launch.operands else None
            for o in op.inputs
        ]
        made = op.reference(*given, **launch.attrs)
        made = made if isinstance(made, tuple) else (made,)
        for output, value in zip(op.outputs, made, strict=True):
            _tensor(addresses[output.name], specs[launch.results[output.name]]).copy_(value)


def _tensor(address: int, spec: TensorSpec) -> torch.Tensor:
    """The fake device's memory as a tensor."""
    raw = torch.from_numpy(host_bytes(address, spec.nbytes({})))
    return raw.view(getattr(torch, spec.dtype)).view(spec.at({}))


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
    made = tuple(one for _, one in classes.values())
    return replace(program, launches=tuple(launches), classes=made, chains=())


def _choices(
    plan: Plan,
    bucket: Bucket,
    launch: Launch,
    index: int,
    binaries: dict[str, Binary],
    cubins: dict[str, bytes],
) -> tuple[PlanCandidate, ...]:
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
    return PlanCandidate("first", tuple(nodes)), PlanCandidate("second", (other,))


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
    binaries[key] = Binary(name, sha256, 4, shared, 32, 0, dependent, len(code), null_pointers)
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
