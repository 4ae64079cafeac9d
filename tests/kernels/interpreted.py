"""What tests of Triton kernels without a GPU share: kernels are interpreted, or cross-compiled.

Triton decides at import whether kernels are interpreted, so interpreted tests run in a process of their own
(:func:`run_interpreted`).
"""
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys

import pytest
import torch

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import OpCall, Pointer, Scalar, Scratch, Tensor
from makeready.kernels.spec import TensorSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

aot = None if INTERPRETED else pytest.importorskip("makeready.graphs.planner.cuda.aot")
if INTERPRETED:
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_index(tensor, scope):
        """Loop bounds that are tensors of one element, which numpy 2.4 no longer takes for numbers."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_index
if INTERPRETED or aot:
    for module in (
        "norm",
        "elementwise",
        "embedding",
        "rope",
        "sample.sample",
        "sample.logprobs",
        "step.locate",
        "step.draft",
        "step.draft_chain",
        "step.draft_forced",
        "step.hidden",
        "step.draft_tree",
        "step.accept_tree",
        "step.move_entries",
    ):
        importlib.import_module(f"makeready.kernels.{module}_triton")


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def op_call(name, operands, attrs, **options):
    """The call of contract ``name`` on CPU tensors (None: absent)."""
    contract = CONTRACTS[name]
    attrs = {**contract.attrs, **attrs}
    tensors = {k: v for k, v in operands.items() if v is not None}
    specs = {k: TensorSpec(tuple(v.shape), dtype_name(v.dtype)) for k, v in tensors.items()}
    results = contract.infer(specs, attrs)
    dims = contract.dims(specs, attrs)
    made = {
        k: Tensor(tuple(v.shape), dtype_name(v.dtype), v.stride(0), math.gcd(v.data_ptr(), 16))
        for k, v in tensors.items()
    }
    made |= {k: Tensor(s.shape, s.dtype, math.prod(map(int, s.shape[1:])), 16) for k, s in results.items()}
    rows = dims.get("R", dims.get("T", 1))
    return OpCall(name, made, attrs, dims, rows, dims.get("T", rows), **options)


def launch_interpreted(candidate, call, operands):
    """Run the launches on CPU tensors; gives the results by name."""
    memory = dict(operands)
    for name, tensor in call.tensors.items():
        if name not in memory:
            dtype = getattr(torch, tensor.dtype)
            poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
            memory[name] = torch.full(tensor.shape, poison, dtype=dtype)
    scratch = torch.full((candidate.scratch + 8,), 0xFF, dtype=torch.uint8)
    for launch in candidate.launches:
        module, _, function = launch.function.partition(":")
        arguments = {}
        for key, value in launch.arguments.items():
            if isinstance(value, Pointer):
                arguments[key] = memory[value.operand]
            elif isinstance(value, Scratch):
                room = scratch[value.offset :]
                size = getattr(torch, value.dtype).itemsize
                arguments[key] = room[: len(room) // size * size].view(getattr(torch, value.dtype))
            else:
                assert isinstance(value, Scalar)
                arguments[key] = value.value
        getattr(importlib.import_module(module), function)[launch.grid](**arguments, **launch.constants)
    return memory


def check_interpreted(name, operands, multiprocessors=132, **attrs):
    contract = CONTRACTS[name]
    attrs = {**contract.attrs, **attrs}
    copies = {k: v.clone() for k, v in operands.items()}
    want = contract.reference(**copies, **attrs)
    want = (want,) if len(contract.outputs) == 1 else want or ()
    call = op_call(name, operands, attrs, multiprocessors=multiprocessors)
    for kernel in registry.cuda_kernels(name):
        for candidate in kernel.candidates(call):
            own = {k: v.clone() if k in contract.writes else v for k, v in operands.items()}
            got = launch_interpreted(candidate, call, own)
            for output, value in zip(contract.outputs, want, strict=True):
                kind = dtype_name(value.dtype)
                if contract.tolerance.exact or not value.is_floating_point():
                    assert got[output.name].equal(value), output.name
                    continue
                error = (got[output.name].double() - value.double()).norm() / value.double().norm()
                assert error <= getattr(contract.tolerance, kind), (output.name, error)
            for written in contract.writes:
                assert got[written].equal(copies[written]), written


def run_interpreted(file):
    """Run a file's interpreted tests in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def columns_of(x, margin=16):
    """``x`` as columns of a wider tensor."""
    wide = torch.full((x.shape[0], x.shape[1] + margin), float("nan"), dtype=x.dtype)
    view = wide[:, margin // 2 : margin // 2 + x.shape[1]]
    return view.copy_(x)


def compiled_kernels(name, operands, attrs):
    attrs = {**CONTRACTS[name].attrs, **attrs}
    call = op_call(name, operands, attrs, features=frozenset({"pdl"}))
    for kernel in registry.cuda_kernels(name):
        for candidate in kernel.candidates(call):
            for launch in candidate.launches:
                made = aot.compile_launch(launch, call)
                assert made.spill_bytes <= launch.local_bytes
                assert made.waits
                yield made
