"""Latent attention of a step's own tokens in CUDA C++, emulated on the CPU, against its reference in float64.

Tokens of no row are NaN, and so are columns of wider buffers and the latents' normed features, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from emulated import Emulator, needs_compiler, op_call

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.attention import mla
from makeready.kernels.attention.mla_own_cuda import candidate
from makeready.kernels.contract import Contract
from makeready.kernels.registry import cuda_kernels

pytestmark = needs_compiler
NAN = float("nan")
B16, F16 = torch.bfloat16, torch.float16
Case = tuple[dict[str, torch.Tensor], dict[str, float]]
assert isinstance(mla.mla_own_attention, Contract)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def make(rows: Sequence[int], heads: int = 2, dtype: torch.dtype = B16, *, steep: float = 1.0) -> Case:
    """Rows of so many tokens; two padding tokens before them, one between, three behind."""
    random = torch.Generator().manual_seed(len(rows))
    starts, tokens = [], 2
    for r, count in enumerate(rows):
        tokens += r == 1
        starts.append(tokens)
        tokens += count
    tensors = {}
    for name, width, first in (("q", heads * 192, 0), ("kv", heads * 256, 0), ("latent", 576, 512)):
        x = torch.full((tokens + 3, width + 64), NAN)
        for start, count in zip(starts, rows, strict=True):
            x[start : start + count, first:width] = torch.randn(count, width - first, generator=random)
        tensors[name] = (x * (steep if name == "q" else 1)).to(dtype)[:, :width]
    tensors["query_start"] = torch.tensor(starts, dtype=torch.int32)
    tensors["query_len"] = torch.tensor(rows, dtype=torch.int32)
    sizes = {"nope": 128, "rope": 64, "value": 128, "rank": 512}
    return tensors, {"heads": heads, **sizes, "scale": 192**-0.5}


def emulate(emulator: Emulator, case: Case, *, seed: int = 0, grid: int = 2) -> dict[str, torch.Tensor]:
    tensors, attrs = case
    call = op_call("mla_own_attention", tensors, attrs, multiprocessors=grid)
    made = emulator.run(candidate(call), call, tensors, seed=seed)
    return {name: made[name] for name in ("y", "log_sum")}


def error(case: Case, made: dict[str, torch.Tensor]) -> float:
    """Of ``y``, relative, by Frobenius norms; NaN where it has one, infinite where logarithms are off."""
    assert isinstance(mla.mla_own_attention, Contract)
    tensors, attrs = case
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    want, logarithms = mla.mla_own_attention.reference(**wide, **attrs)
    if not torch.allclose(made["log_sum"].double(), logarithms.double(), atol=2e-2):
        return float("inf")
    return float((made["y"].double() - want).norm() / want.norm())


CASES = {
    "edges": make([1, 63, 0, 64, 65, 129], 1),
    "tiles": make([128, 127, 256]),
    "long": make([390, 3], 1),
    "float16": make([70, 1, 130], 1, F16),
    "steep": make([300, 9], 1, steep=20.0),
    "many rows": make([*([0] * 31), 2, *([0] * 5), 66], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(emulator: Emulator, name: str) -> None:
    case = CASES[name]
    allowed = 5e-3 if case[0]["q"].dtype == B16 else 1e-3
    assert error(case, emulate(emulator, case, seed=list(CASES).index(name))) < allowed
