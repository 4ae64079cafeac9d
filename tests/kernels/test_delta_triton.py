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
from case import Case
from inputs import cases
from test_attention_triton import _call, _interpret, _numpy_2_4, compiled, interpreted

from makeready.kernels import registry
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall

registry.discover("cuda")
assert _numpy_2_4  # a fixture for all tests here


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", __file__]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def call_of(case: Case, **changes: Any) -> OpCall:
    call = _call(case.contract, case.operands, case.attrs, "")
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


def owned(case: Case) -> torch.Tensor:
    """Tokens that are of some row: what others give is not said."""
    o = case.operands
    if "query_len" not in o:
        return torch.ones(len(o["x"]), dtype=torch.bool)
    token = torch.arange(len(o["qkv" if "qkv" in o else "x"]))[:, None]
    return ((token >= o["query_start"]) & (token < o["query_start"] + o["query_len"])).any(1)


def hold(case: Case, **changes: Any) -> None:
    """Every way against the reference in float64; nothing else is written."""
    call = call_of(case, **changes)
    wanted = case.mapped(lambda x: x.double() if x.is_floating_point() else x).run()
    found, mine = ways(call), owned(case)
    assert found
    for way in found.values():
        written = {k: v.clone() if k in case.contract.writes else v for k, v in case.operands.items()}
        got = _interpret(way, call, written)
        for name, want in wanted.items():
            where = f"{case.op}/{way.name} of {case.label}: {name}"
            have = got[name].double()
            if name not in case.contract.writes:
                have, want = have[mine], want[mine]
            assert torch.equal(have.isnan(), want.isnan()), f"{where} has NaN in other places"
            keep = ~want.isnan()
            error = (have - want)[keep].norm() / want[keep].norm().clamp_min(1e-30)
            allowed = allowance(case.contract, got[name])
            assert error <= allowed, f"{where} is off by {error:.1e}"


def allowance(contract: Contract, made: torch.Tensor) -> float:
    return getattr(contract.tolerance, str(made.dtype).removeprefix("torch."))


def some(op: str, *parts: str, dtypes: Sequence[str] = ("float32", "float16")) -> Iterator[Case]:
    """Cases whose labels have one of ``parts`` in them."""
    for case in cases(op):
        if any(part in case.label for part in parts) and any(case.label.endswith(d) for d in dtypes):
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
    for case in some("recurrent_delta_rule", f"{rows}-"):
        hold(case, multiprocessors=1)


@interpreted
def test_gated_norm_and_gate() -> None:
    for op in ("gated_head_rms_norm", "sigmoid_mul"):
        for case in cases(op):
            if all(x.dtype != torch.bfloat16 for x in case.operands.values()) and "extreme" not in case.label:
                hold(case)
