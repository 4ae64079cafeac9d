"""Attention over cached latents in CUDA C++, emulated on the CPU, against the contracts' references in float64.

Every slot without a token is NaN, and so are queries of rows without one, padding tokens, and what columns of a wider
buffer lie between. Whatever was read without being a row's shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulated import Emulator, needs_compiler, op_call

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.attention import mla
from makeready.kernels.attention.mla_decode_cuda import Cut, candidate, cut
from makeready.kernels.contract import Contract
from makeready.kernels.registry import cuda_kernels

pytestmark = needs_compiler
NAN = float("nan")
WIDTH, RANK = 576, 512
B16, F16 = torch.bfloat16, torch.float16
Case = tuple[Contract, dict[str, torch.Tensor], dict[str, float]]
Made = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def cached(lengths: Sequence[int], page: int, random: torch.Generator) -> Made:
    """Latents in pages of random order, among them two that nobody owns."""
    needed = [-(-length // page) for length in lengths]
    pages = 2 + sum(needed)
    cache = torch.full((pages, page, WIDTH), NAN)
    table = torch.full((len(lengths), max(needed) + 2), pages - 1, dtype=torch.int32)
    order = (1 + torch.randperm(pages - 2, generator=random)).tolist()
    for r, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine, order = order[:count], order[count:]
        table[r, :count] = torch.tensor(mine, dtype=torch.int32)
        x = torch.full((count * page, WIDTH), NAN)
        x[:length] = torch.randn(length, WIDTH, generator=random)
        cache[mine] = x.view(count, page, WIDTH)
    return {"cache": cache, "page_table": table, "context_len": torch.tensor(lengths, dtype=torch.int32)}


def decode(
    lengths: Sequence[int], heads: int, page: int = 64, dtype: torch.dtype = B16, steep: float = 1.0
) -> Case:
    """One query a row; ``steep``: what scores are multiplied by."""
    assert isinstance(mla.mla_decode_attention, Contract)
    random = torch.Generator().manual_seed(len(lengths))
    tensors = cached(lengths, page, random)
    q = torch.full((len(lengths), heads * WIDTH + 64), NAN)
    for r, length in enumerate(lengths):
        if length:
            q[r, : heads * WIDTH] = steep * torch.randn(heads * WIDTH, generator=random)
    tensors |= {"q": q.to(dtype)[:, : heads * WIDTH], "cache": tensors["cache"].to(dtype)}
    return mla.mla_decode_attention, tensors, {"heads": heads, "rank": RANK, "rope": 64, "scale": WIDTH**-0.5}


def extend(rows: Sequence[tuple[int, int]], heads: int, page: int = 64, dtype: torch.dtype = B16) -> Case:
    """Rows of (queries, context with them), of whose latents the last queries' are NaN; padding tokens around them."""
    assert isinstance(mla.mla_extend_attention, Contract)
    random = torch.Generator().manual_seed(len(rows))
    tensors = cached([context - queries for queries, context in rows], page, random)
    starts, tokens = [], 2
    for r, (queries, _) in enumerate(rows):
        tokens += r == 1
        starts.append(tokens)
        tokens += queries
    q = torch.full((tokens + 3, heads * WIDTH + 64), NAN)
    for (queries, _), first in zip(rows, starts, strict=True):
        q[first : first + queries, : heads * WIDTH] = torch.randn(queries, heads * WIDTH, generator=random)
    tensors |= {"q": q.to(dtype)[:, : heads * WIDTH], "cache": tensors["cache"].to(dtype)}
    numbers = (
        ("query_start", starts),
        ("query_len", [n for n, _ in rows]),
        ("context_len", [n for _, n in rows]),
    )
    tensors |= {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers}
    attrs = {"heads": heads, "rank": RANK, "rope": 64, "scale": WIDTH**-0.5, "own": False}
    return mla.mla_extend_attention, tensors, attrs


def emulate(emulator: Emulator, case: Case, *, seed: int = 0, blocks: int = 3) -> Made:
    contract, tensors, attrs = case
    call = op_call(contract.name, tensors, attrs, multiprocessors=blocks)
    made = emulator.run(candidate(call), call, tensors, seed=seed)
    return {name: made[name] for name in call.tensors if name not in tensors}


def error(case: Case, made: Made) -> float:
    """Of the results, relative, by Frobenius norms; NaN where one has it, infinite where logarithms are off."""
    contract, tensors, attrs = case
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    wide["cache"] = wide["cache"].nan_to_num()  # the reference multiplies what no token sees by zero
    wanted = contract.reference(**wide, **attrs)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert not wanted[0].isnan().any()
    if "log_sum" in made and not torch.allclose(made["log_sum"].double(), wanted[1].double(), atol=2e-2):
        return float("inf")
    return float((made["y"].double() - wanted[0]).norm() / wanted[0].norm())


EDGES = (1, 63, 0, 64, 65, 128, 129, 17)
CASES: dict[str, tuple[Case, int]] = {
    "16 heads": (decode(EDGES, 16), 3),
    "one token": (decode([1], 16), 2),
    "one row over all": (decode([1000], 16), 7),
    "one row, more blocks than keys": (decode([130], 16), 9),
    "rows that end with shares": (decode([128, 256, 128], 16), 4),
    "many short rows": (decode([*([0] * 30), 3, *([0] * 9), 70, 1], 16), 2),
    "8 heads": (decode(EDGES, 8), 3),
    "5 heads": (decode((65, 0, 200), 5), 2),
    "12 heads": (decode((65, 0, 200), 12), 2),
    "32 heads": (decode(EDGES, 32), 3),
    "float16": (decode((100, 64, 333), 16, 128, F16), 4),
    "page of 256": (decode((100, 513, 256), 16, 256), 4),
    "steep": (decode((300, 130), 16, steep=20.0), 2),
    "64 heads": (decode((130, 1, 0, 100), 64), 3),
    "128 heads": (decode((130, 0, 70), 128), 4),
    "extend": (extend([(5, 200), (3, 3), (0, 0), (1, 65), (9, 73)], 16), 3),
    "extend, 20 heads": (extend([(4, 150), (1, 1)], 20), 2),
    "extend, 64 heads, long": (extend([(2, 400)], 64, 128, F16), 5),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(emulator: Emulator, name: str) -> None:
    case, blocks = CASES[name]
    made = emulate(emulator, case, blocks=blocks, seed=list(CASES).index(name))
    assert error(case, made) < (5e-3 if case[1]["q"].dtype == B16 else 1e-3)
