"""Products of few tokens with packed weights in CUDA C++, emulated on the CPU, against contracts in float64.

Rows beyond the last token are NaN, what fills words up to whole spans is random.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from case import Random
from emulated import Emulator, needs_compiler, op_call
from mx_inputs import WEIGHTS

from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm import linear_few_int_cuda
from makeready.kernels.gemm.few import Way, columns
from makeready.kernels.integers import pack_words, tiles

pytestmark = [needs_compiler, pytest.mark.slow]
B16, F16 = torch.bfloat16, torch.float16
ERROR = {B16: 3e-3, F16: 4e-4}
_GUARD = 16  # rows of NaN behind the last
# Tokens, outputs, inputs, inputs of a group, blocks of a cluster, blocks: a ring that is filled often, an odd span,
# tiles that end early, turns over several tiles, a group of several spans, one group, ranks with unequal shares.
CASES = [
    (1, 64, 512, 128, 1, 1),
    (7, 200, 640, 128, 1, 2),
    (16, 132, 4096, 128, 1, 1),
    (8, 260, 1344, 256, 2, 4),
    (30, 516, 2304, 2304, 4, 8),
    (61, 196, 1536, 128, 2, 4),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def make(
    T: int,
    N: int,
    K: int,
    group: int,
    dtype: torch.dtype,
    *,
    zeros: bool,
    bias: bool,
    bits: int = 4,
    offsets: bool = False,
) -> dict[str, torch.Tensor]:
    """Operands of a product."""
    random = torch.Generator().manual_seed(T + N + K)
    groups, whole = -(-K // group), -(-K // 128) * 128
    scale = torch.randn(N, groups, generator=random).exp().div(2 ** (bits + 2)).half()
    made = {
        "x": torch.cat((torch.randn(T, K, generator=random), torch.full((_GUARD, K), math.nan))).to(dtype)[
            :T
        ],
        "weight": pack_words(torch.randint(2**bits, (N, whole), generator=random), bits),
        "weight_scale": tiles(scale),
    }
    if zeros:
        made["weight_zero"] = tiles(torch.randint(2**bits, (N, groups), generator=random).to(torch.uint8))
    if offsets:
        made["weight_zero"] = tiles(torch.randn(N, groups, generator=random).half())
    if bias:
        made["bias"] = torch.randn(N, generator=random).to(dtype)
    return made


@pytest.mark.parametrize(
    ("T", "N", "K", "group", "split", "blocks"),
    [case if i < 2 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_against_float64(
    emulator: Emulator, T: int, N: int, K: int, group: int, split: int, blocks: int
) -> None:
    for dtype, zeros, bias in ((B16, True, False), (F16, False, True)):
        tensors = make(T, N, K, group, dtype, zeros=zeros, bias=bias)
        check(emulator, "linear_int", tensors, {"bits": 4, "group": group}, Way(columns(T), split, blocks))


@pytest.mark.parametrize(("T", "N", "K", "group", "split", "blocks"), CASES)
def test_eight_bits_against_float64(
    emulator: Emulator, T: int, N: int, K: int, group: int, split: int, blocks: int
) -> None:
    for dtype, zeros, bias in ((B16, True, True), (F16 if T % 2 else B16, False, False)):
        tensors = make(T, N, K, group, dtype, zeros=zeros, bias=bias, bits=8)
        check(emulator, "linear_int", tensors, {"bits": 8, "group": group}, Way(columns(T), split, blocks))


@pytest.mark.parametrize(
    ("bits", "group", "offsets"), [(4, 32, True), (4, 64, False), (8, 16, False), (8, 32, True)]
)
@pytest.mark.parametrize(
    ("T", "N", "K", "split", "blocks"), [(*case[:3], *case[4:]) for case in (*CASES[:2], CASES[3], CASES[5])]
)
def test_groups_in_spans_against_float64(
    emulator: Emulator, bits: int, group: int, offsets: bool, T: int, N: int, K: int, split: int, blocks: int
) -> None:
    """As GGUF's blocks are; what a span lacks has no scale in the last step's copy. Weights are rounded, too."""
    for dtype, bias in ((B16, False), (F16, True)):
        tensors = make(T, N, K, group, dtype, zeros=False, bias=bias, bits=bits, offsets=offsets)
        attrs, way = {"bits": bits, "group": group}, Way(columns(T), split, blocks)
        check(emulator, "linear_int", tensors, attrs, way, within=1.7 * ERROR[dtype])


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize(("T", "N", "K", "split", "blocks"), [(*case[:3], *case[4:]) for case in CASES])
def test_floats_against_float64(
    emulator: Emulator, form: str, T: int, N: int, K: int, split: int, blocks: int
) -> None:
    """What a span lacks has no scale in the last step's copy; there are spans with half of their fields."""
    random = Random(T + N + K)
    for dtype, bias in ((B16, False), (F16, True)):
        x = torch.cat((random.normal(T, K), torch.full((_GUARD, K), math.nan))).to(dtype)[:T]
        tensors = {"x": x, **WEIGHTS[form](random, N, K)}
        tensors |= {"bias": random.normal(N).to(dtype)} if bias else {}
        check(emulator, "linear_mx", tensors, {}, Way(columns(T), split, blocks))


def check(
    emulator: Emulator,
    op: str,
    tensors: dict[str, torch.Tensor],
    attrs: dict[str, Any],
    way: Way,
    *,
    within: float = 0.0,
    out: torch.dtype | None = None,
) -> None:
    """Hold one way to the contract, with threads in two orders; rows of no token stay as they are.

    Blocks have a multiprocessor to themselves in one of them, which then have more warps where there is a choice.
    """
    dtype, (T, _), N = tensors["x"].dtype, tensors["x"].shape, len(tensors["weight"])
    attrs = attrs | ({"out_dtype": "float32"} if out else {})
    y = torch.full((T + _GUARD, N), math.nan, dtype=out or dtype)
    full = {**tensors, "y": y[:T]}
    wide = {k: v.double() if k in ("x", "bias") else v for k, v in tensors.items()}
    want = CONTRACTS[op].reference(**wide, **attrs | {"out_dtype": "float64"})
    for seed, multiprocessors in ((0, 8), (1, 1)):
        call = op_call(op, tensors, attrs, multiprocessors=multiprocessors)
        assert linear_few_int_cuda.applies(call)
        y.fill_(math.nan)
        got = emulator.run(linear_few_int_cuda.candidate(call, way), call, full, seed=seed)["y"]
        assert bool(y[T:].isnan().all()), "rows of no token were written"
        assert float((got.double() - want).norm() / want.norm()) < (within or ERROR[dtype])
