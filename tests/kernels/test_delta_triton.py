"""Kernels of gated delta nets without a GPU: interpreted against the references, and cross-compiled.

Interpreted functions need a process of their own; see test_attention_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import delta_inputs
from attention_interpreted import compiled, interpret, interpreted, numpy_2_4, op_call
from case import Case
from delta_rounding import CASES, awkward, chunked, off, operands
from inputs import cases

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall

registry.discover("cuda")
assert numpy_2_4  # a fixture for all tests here


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", __file__]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def call_of(case: Case, **changes: Any) -> OpCall:
    call = op_call(case.contract, case.operands, case.attrs, "")
    blocks = {
        name: replace(tensor, shape=("P", *tensor.shape[1:]))
        for name, tensor in call.tensors.items()
        if name in case.contract.writes
    }
    return replace(call, tensors={**call.tensors, **blocks}, **changes)


def ways(call: OpCall) -> dict[str, Candidate]:
    """Different ways; warps and stages are nothing to the interpreter."""
    found = [way for kernel in registry.cuda_kernels(call.op) for way in kernel.candidates(call)]
    return {str([launch.constants for launch in way.launches]): way for way in found}


def hold(case: Case, **changes: Any) -> None:
    """Every way against the reference in float64; nothing else is written."""
    call = call_of(case, **changes)
    wanted = case.widened().run()
    found, mine = ways(call), delta_inputs.owned(case)
    assert found
    for way in found.values():
        written = {k: v.clone() if k in case.contract.writes else v for k, v in case.operands.items()}
        got = interpret(way, call, written)
        for name, want in wanted.items():
            where = f"{case.op}/{way.name} of {case.label}: {name}"
            have, want = got[name].double(), want.double()
            if name not in case.contract.writes:
                have, want = have[mine], want[mine]
            assert torch.equal(have.isnan(), want.isnan()), f"{where} has NaN in other places"
            keep = ~want.isnan()
            error = (have - want)[keep].norm() / want[keep].norm().clamp_min(1e-30)
            allowed = allowance(case, got[name])
            assert error <= allowed, f"{where} is off by {error:.1e}"


def allowance(case: Case, made: torch.Tensor) -> float:
    """By the dtype of the result; by chunks of fp32 numbers as near as token by token."""
    dtype = str(made.dtype).removeprefix("torch.")
    if case.rounded and dtype == "float32":
        return 1e-3  # where a state of 16 bits is rounded to its other neighbour
    if dtype == "float32" and all(x.dtype != torch.float16 for x in case.operands.values()):
        return 1e-5
    return getattr(case.contract.tolerance, dtype)


def some(op: str, *parts: str, dtypes: Sequence[str] = ("float32", "float16")) -> Iterator[Case]:
    """Cases whose labels have one of ``parts`` in them."""
    for case in cases(op):
        if any(x.dtype == torch.bfloat16 for x in case.operands.values()):
            continue
        if any(part in case.label for part in parts) and any(case.label.endswith(f"-{d}") for d in dtypes):
            yield case


@interpreted
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("rows", ["few", "one", "decode", "padding", "nobody"])
def test_convolution(rows: str, invariant: bool) -> None:
    for case in some("causal_conv_silu", f"{rows}-10x4", f"{rows}-1x2", f"{rows}-300x4"):
        hold(case, invariant=invariant)


@interpreted
@pytest.mark.parametrize("rows", ["few", "one", "decode", "nobody"])
def test_token_by_token(rows: str) -> None:
    for case in some("recurrent_delta_rule", f"{rows}-", dtypes=("float32", "float16", "in_float16")):
        hold(case, multiprocessors=1)


@interpreted
def test_gated_norm_and_gate() -> None:
    for op in ("gated_head_rms_norm", "sigmoid_mul"):
        for case in cases(op):
            if all(x.dtype != torch.bfloat16 for x in case.operands.values()) and "extreme" not in case.label:
                hold(case)


@interpreted
@pytest.mark.parametrize("rows", ["few", "one", "chunk-borders", "padding", "nobody"])
def test_by_chunks(rows: str) -> None:
    for case in some("chunk_delta_rule", f"{rows}-", dtypes=("float32", "float16", "in_float16")):
        hold(case, multiprocessors=1)


@interpreted
@pytest.mark.parametrize("at", range(0, len(CASES), 7))
def test_awkward_keys_are_rounded_as_the_model_rounds(at: int) -> None:
    """Which is how rounding in bf16 is known, that the interpreter does not have."""
    x = [
        part.half().float() if i < 3 else part
        for i, part in enumerate(awkward(at, *CASES[at], "keys", features=32))
    ]
    case = operands(x, 0, torch.float16)
    call = call_of(case, multiprocessors=1)
    y, s = chunked(*(part[:1] for part in x), torch.float16, exact=True)
    wanted = case.widened().run()
    for way in ways(call).values():
        got = interpret(way, call, {k: v.clone() for k, v in case.operands.items()})
        assert off(got["y"], y[0].half().double()) < 5e-4
        assert off(got["state"][1, 0], s[0].double()) < 5e-4
        assert off(got["y"], wanted["y"]) < case.contract.tolerance.float16
        assert off(got["state"][1, 0], wanted["state"][1, 0]) < case.contract.tolerance.float16


NEXT = {"key_heads": 16, "key_dim": 128, "value_heads": 32, "value_dim": 128}  # Qwen3-Next's sizes
OPS = ("causal_conv_silu", "recurrent_delta_rule", "chunk_delta_rule", "gated_head_rms_norm", "sigmoid_mul")


def real_call(
    op: str, rows: int, tokens: int, *, invariant: bool = False, state: torch.dtype = torch.float32
) -> OpCall:
    """A call of ``op`` as in a plan for Qwen3-Next, without memory."""
    values = NEXT["value_heads"] * NEXT["value_dim"]
    shapes = {
        "x": (tokens, 8192 if op == "causal_conv_silu" else values),
        "gate": (tokens, values),
        "weight": (4, 8192) if op == "causal_conv_silu" else (NEXT["value_dim"],),
        "tail": (9, 3, 8192),
        "qkv": (tokens, 8192),
        "ba": (tokens, 64),
        "a_log": (32,),
        "dt_bias": (32,),
        "state": (9, 32, 128, 128),
    }
    contract, attrs = CONTRACTS[op], {**NEXT, "eps": 1e-6, "heads": 32, "head_dim": 128}
    kinds = {"int32": torch.int32, "float32": torch.float32, "W": torch.float32, "C": state}
    operands = {
        o.name: torch.empty(
            shapes.get(o.name, (rows,)),
            dtype=kinds.get(o.dtype, torch.bfloat16),
            device="meta",
        )
        for o in contract.inputs
    }
    call = op_call(contract, operands, {name: attrs[name] for name in contract.attrs}, "tma wgmma pdl fp8")
    return replace(call, rows=rows, tokens=tokens, invariant=invariant, most_rows=64)


@compiled
@pytest.mark.parametrize(
    ("op", "state"),
    [*((op, torch.float32) for op in OPS), *((op, torch.bfloat16) for op in OPS[1:3])],
    ids=str,
)
@pytest.mark.parametrize(("rows", "tokens"), [(64, 64), (2, 4096)])
def test_machine_code(op: str, state: torch.dtype, rows: int, tokens: int) -> None:
    """The best way: no spills, shared memory of a block, products on tensor cores, the wait."""
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    call = real_call(op, rows, tokens, state=state)
    for launch in next(iter(ways(call).values())).launches:
        made = aot.compile_launch(launch, call)
        assert made.spill_bytes == 0
        assert made.shared <= call.shared_bytes
        assert launch.dependent
        assert made.waits
        products = op == "chunk_delta_rule"
        assert ("wgmma.mma_async" in made.ptx or "mma.sync" in made.ptx) == products


@compiled
def test_deterministic_plans_have_one_way_for_all_steps() -> None:
    """The same constants and options in every bucket; only grids differ."""
    for op in ("causal_conv_silu", "recurrent_delta_rule", "gated_head_rms_norm", "sigmoid_mul"):
        found = []
        for rows, tokens in ((1, 1), (64, 64), (3, 2048)):
            call = real_call(op, rows, tokens, invariant=True)
            made = [launch for way in ways(call).values() for launch in way.launches]
            found.append([(str(one.constants), one.num_warps, one.num_stages) for one in made])
        assert found[0] == found[1] == found[2]
    assert not ways(real_call("chunk_delta_rule", 3, 2048, invariant=True))
