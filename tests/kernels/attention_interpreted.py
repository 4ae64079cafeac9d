"""What tests of attention kernels without a GPU share: they are interpreted against references, or cross-compiled.

Triton decides when a kernel is decorated whether it is interpreted, so interpreted tests run in a process of their
own. The interpreter has no bf16 and no programmatic launches; fp16 stands in.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from makeready.kernels import registry
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall, Pointer, Scalar, Scratch, Tensor
from makeready.kernels.spec import TensorSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreted in its own process")
compiled = pytest.mark.skipif(INTERPRETED, reason="interpreted functions cannot be compiled")


@pytest.fixture(autouse=True)
def numpy_2_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 2.4 no longer takes arrays of one element for an index, as the interpreter's scalars are."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def emit(contract: Contract, call: OpCall) -> Sequence[Candidate]:
    for module in ("decode", "extend", "qkv", "verify", "write_scaled"):
        importlib.import_module(f"makeready.kernels.attention.{module}_triton")
    return [c for k in registry.cuda_kernels(contract.name) for c in k.candidates(call)]


def own_ways(contract: Contract, call: OpCall) -> list[Candidate]:
    """Those by the op's own kernel, without what stands in for it."""
    own = contract.name.removesuffix("_scaled")
    return [c for c in emit(contract, call) if own in c.launches[0].function]


def op_call(
    contract: Contract, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any], features: str
) -> OpCall:
    """The call on these operands, for two small multiprocessors when interpreted, so that blocks share items."""
    attrs = {**contract.attrs, **attrs}
    specs = {k: TensorSpec(tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in tensors.items()}
    dims = dict(contract.dims(specs, attrs))
    made = {
        k: Tensor(v.shape, v.dtype, math.prod(int(d) for d in v.shape[1:]), 256)
        for k, v in contract.infer(specs, attrs).items()
    }
    for name, tensor in tensors.items():
        paged = name.endswith("cache") or name == "scales"
        shape = ("P", *tensor.shape[1:]) if paged else tuple(tensor.shape)
        made[name] = Tensor(shape, specs[name].dtype, tensor.stride(0), math.gcd(tensor.data_ptr(), 256))
    rows = int(dims["R" if "R" in dims else "T"])
    return OpCall(
        contract.name, made, attrs, dims, rows, int(dims.get("T", rows)),
        multiprocessors=3 if INTERPRETED else 132, features=frozenset(features.split()),
    )  # fmt: skip


def interpret(
    candidate: Candidate, call: OpCall, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run ``candidate``; results start as NaN, scratch as garbage behind its counters."""
    full = dict(tensors)
    for name, tensor in call.tensors.items():
        if name not in full:
            full[name] = torch.full(tensor.shape, float("nan"), dtype=getattr(torch, tensor.dtype))  # type: ignore[arg-type]
    scratch = torch.full((max(1, candidate.scratch),), 0xFF, dtype=torch.uint8)
    scratch[: candidate.zeroed] = 0
    for launch in candidate.launches:
        module, name = launch.function.split(":")
        values: dict[str, Any] = dict(launch.constants)
        for key, argument in launch.arguments.items():
            if isinstance(argument, Pointer):
                values[key] = full[argument.operand]
            elif isinstance(argument, Scratch):
                values[key] = scratch[argument.offset :].view(getattr(torch, argument.dtype))
            else:
                assert isinstance(argument, Scalar), "the interpreter runs no tensor maps"
                values[key] = argument.value
        getattr(importlib.import_module(module), name)[launch.grid](**values)
    assert not scratch[: candidate.zeroed].any()
    return full


def check(contract: Contract, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> None:
    call = op_call(contract, tensors, attrs, "")
    wide = {k: v.double() if v.is_floating_point() else v.clone() for k, v in tensors.items()}
    expected = contract.reference(*(wide.get(o.name) for o in contract.inputs), **call.attrs)
    wanted = {o.name: expected for o in contract.outputs} | {name: wide[name] for name in contract.writes}
    # Warps and stages are nothing to the interpreter.
    candidates = {str(c.launches[0].constants): c for c in emit(contract, call)}
    assert candidates
    for candidate in candidates.values():
        written = {k: v.clone() if k in contract.writes else v for k, v in tensors.items()}
        got = interpret(candidate, call, written)
        for name, want in wanted.items():
            keep = ~want.isnan()
            error = (got[name].double() - want)[keep].norm() / want[keep].norm().clamp_min(1e-30)
            assert torch.equal(got[name].isnan(), want.isnan()), f"{candidate.name}: {name} has NaN"
            assert error <= contract.tolerance.float16, f"{candidate.name}: {name} is off by {error:.1e}"


def paged_caches(
    lengths: Sequence[int], *, page: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Caches with NaN in every slot that holds no token, shuffled pages, and their table."""
    g = torch.Generator().manual_seed(0)
    a_row = [-(-length // page) for length in lengths]
    total = 1 + sum(a_row)
    order = (1 + torch.randperm(total - 1, generator=g)).tolist()
    table = torch.zeros(len(lengths), max(a_row) + 1, dtype=torch.int32)
    caches = [torch.full((total, page, kv_heads, head_dim), float("nan")).to(dtype) for _ in "kv"]
    for r, (length, count) in enumerate(zip(lengths, a_row, strict=True)):
        mine, order = order[:count], order[count:]
        table[r, :count] = torch.tensor(mine, dtype=torch.int32)
        for cache in caches:
            for i, p in enumerate(mine):
                used = min(page, length - i * page)
                cache[p, :used] = torch.randn(used, kv_heads, head_dim, generator=g).to(dtype)
    return {
        "k_cache": caches[0],
        "v_cache": caches[1],
        "page_table": table,
        "context_len": torch.tensor(lengths, dtype=torch.int32),
    }


Geometry = tuple[int, int, int, int, int]  # heads, KV heads, head size, page, window
F16, F8 = torch.float16, torch.float8_e4m3fn


def attrs_of(geometry: Geometry) -> dict[str, float]:
    heads, kv_heads, head_dim, _, window = geometry
    scale = head_dim**-0.5
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": scale, "window": window}


def verify_step(
    tensors: dict[str, torch.Tensor], heads: int, head_dim: int, each: int, rows: Sequence[tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Rows of (queries, context), packed; tokens of no row, whose queries are NaN, behind them."""
    count = torch.tensor([queries for queries, _ in rows], dtype=torch.int32)
    q = torch.full((each * len(rows), heads * head_dim), float("nan"), dtype=torch.float16)
    q[: int(count.sum())] = torch.randn(int(count.sum()), heads * head_dim).half()
    return tensors | {"q": q, "query_start": (count.cumsum(0) - count).to(torch.int32), "query_len": count}


def run_interpreted(file: str) -> None:
    """Run a file's interpreted tests in a process of their own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
