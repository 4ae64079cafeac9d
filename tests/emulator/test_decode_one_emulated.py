"""One decoding row in CUDA C++, emulated on the CPU, against the contract's reference in float64.

Every slot without a token is NaN, that of the row's own token as well, and so are pages before the window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import Emulator, needs_compiler, op_call

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.attention.decode_one_cuda import decode_one
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.registry import cuda_kernels

pytestmark = [needs_compiler, pytest.mark.slow]
OP = "norm_rope_kv_write_decode_attention"
NAN, B16, F16 = float("nan"), torch.bfloat16, torch.float16
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def make(
    length: int, *, D: int = 128, group: int = 4, kv_heads: int = 2, page: int = 64, window: int = 0,
    norm: bool = True, offset: float = 0.0, dtype: torch.dtype = B16, seed: int = 0,
) -> tuple[Tensors, dict[str, Any]]:  # fmt: skip
    """Operands and attributes of a row of ``length`` tokens, its own among them."""
    random = torch.Generator().manual_seed(seed + length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    heads, needed = kv_heads * group, max(-(-length // page), 1)
    order = (1 + torch.randperm(needed + 2, generator=random)).tolist()
    table = torch.full((1, needed + 2), order[-1], dtype=torch.int32)
    table[0, :needed] = torch.tensor(order[:needed])
    own, freed = length - 1, max(length - window, 0) // page * page if window else 0
    tensors: Tensors = {}
    for name in ("k_cache", "v_cache"):
        x = torch.full((needed * page, kv_heads, D), NAN)
        x[freed : max(own, freed)] = normal(max(own - freed, 0), kv_heads, D)
        cache = torch.full((needed + 4, page, kv_heads, D), NAN)
        cache[order[:needed]] = x.view(needed, page, kv_heads, D)
        tensors[name] = cache.to(dtype)
    tensors["qkv"] = (2 * normal(1, (heads + 2 * kv_heads) * D)).to(dtype)
    angles = 6 * torch.rand(1, D // 2, generator=random)
    tensors["rows"] = torch.cat((angles.cos(), angles.sin()), 1)
    if norm:
        tensors |= {n: (1 + 0.3 * normal(D)).to(dtype) for n in ("q_norm", "k_norm")}
    place = int(table[0, own // page]) * page + own % page if length else 0
    numbers = {"kv_slot": [place], "context_len": [length]}
    tensors |= {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
    tensors["page_table"] = table
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": D, "scale": D**-0.5, "window": window}
    return tensors, attrs | {"eps": 1e-6, "offset": offset}


def emulate(
    emulator: Emulator, tensors: Tensors, attrs: dict[str, Any], *, splits: int, seed: int = 0
) -> Tensors:
    """Operands and the result; caches are copies."""
    own = {name: tensors[name].clone() for name in ("k_cache", "v_cache")}
    tensors = {**tensors, **own}
    call = op_call(OP, tensors, attrs, multiprocessors=splits * attrs["kv_heads"])
    (way,) = decode_one(call)
    return emulator.run(way, call, tensors, seed=seed)


def is_right(tensors: Tensors, attrs: dict[str, Any], got: Tensors, limit: float) -> bool:
    """Result and the written keys and values; nothing else of the caches has changed."""
    contract = CONTRACTS[OP]
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    wide["rows"] = tensors["rows"]
    for name in ("k_cache", "v_cache"):  # the reference multiplies what a window hides by zero
        wide[name] = wide[name].nan_to_num()
    want = contract.reference(*(wide.get(o.name) for o in contract.inputs), **attrs)
    slot = int(tensors["kv_slot"])
    for name in ("k_cache", "v_cache"):
        new, old, wanted = (x[name].flatten(0, 1).double() for x in (got, tensors, wide))
        if int(tensors["context_len"]):
            if not torch.allclose(new[slot], wanted[slot], rtol=1e-2, atol=1e-2):
                return False
            new[slot] = old[slot] = 0
        if not torch.equal(new.nan_to_num(-9), old.nan_to_num(-9)):
            return False
    size = float(want.norm())
    return bool((got["y"].double() - want).norm() <= limit * size) if size else not bool(got["y"].any())


# Lengths around a run of 16 keys, a block's tile, a page and a share; shares that are empty.
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 200, 257, 640]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(emulator: Emulator, length: int) -> None:
    case = make(length)
    for splits, seed in ((1, 0), (3, 1), (16, 2)):
        got = emulate(emulator, *case, splits=splits, seed=seed + length)
        assert is_right(*case, got, 6e-3), f"{splits} splits"


@pytest.mark.parametrize(
    "options",
    [
        {"group": 1, "kv_heads": 3},
        {"group": 2},
        {"D": 64},
        {"D": 64, "group": 1},
        {"D": 64, "group": 2, "kv_heads": 1},
        {"page": 16},
        pytest.param({"page": 256}, marks=pytest.mark.slow),
        pytest.param({"window": 1}, marks=pytest.mark.slow),
        pytest.param({"window": 50}, marks=pytest.mark.slow),
        pytest.param({"window": 130, "page": 32}, marks=pytest.mark.slow),
        pytest.param({"norm": False}, marks=pytest.mark.slow),
        pytest.param({"offset": 1.0}, marks=pytest.mark.slow),
        pytest.param({"dtype": F16}, marks=pytest.mark.slow),
        pytest.param({"dtype": F16, "D": 64, "window": 40}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_geometries(emulator: Emulator, options: dict[str, Any]) -> None:
    for length in (1, 90, 333):
        case = make(length, **options)
        assert is_right(*case, emulate(emulator, *case, splits=4, seed=length), 6e-3)


def test_a_row_without_a_token_gives_zeros(emulator: Emulator) -> None:
    case = make(0)
    assert is_right(*case, emulate(emulator, *case, splits=3), 0)


def test_which_block_is_last_does_not_matter(emulator: Emulator) -> None:
    """To the last bit: parts are added in their order."""
    case = make(500)
    ways = [emulate(emulator, *case, splits=5, seed=seed)["y"] for seed in range(1, 5)]
    assert all(torch.equal(ways[0], other) for other in ways[1:])


FAULTS = {
    "the projection is read before it is there": ("  dependence_wait();\n", ""),
    "the own slot is read": ("own = length - 1;", "own = length;"),
    "the next token is seen": ("position + key < stop;", "position + key <= stop;"),
    "a window is too wide": ("max(length - WINDOW, 0)", "max(length - WINDOW - 1, 0)"),
    "queries are not waited for": ("  __syncthreads();\n\n  float q[GROUP]", "\n  float q[GROUP]"),
    "sums are not rescaled": ("acc[h][j] *= s;", "acc[h][j] *= 1;"),
    "parts of warps are not waited for": ("  __syncthreads();\n  float* part", "  float* part"),
    "parts of blocks are not waited for": ("== parts - 1;", "== parts - 2;"),
    "the counter is left": ("if (*last) arrived[head] = 0;", ""),
    "blocks that do not have it keep the key": ("if (keeps && position", "if (position"),
    "the key is not kept": ("      *(Int4*)(k_cache + place) = k[i];\n", ""),
    "a value of another head": ("(HEADS + KV_HEADS + head) * D", "(HEADS + KV_HEADS) * D"),
    "halves turn the other way": ("lane < 16 ? -other : other", "lane < 16 ? other : -other"),
    "the key's norm is the query's": ("is_q ? gains[0][j] : gains[1][j]", "gains[0][j]"),
    "the page of the tile before": ("load(v, v_cache, next_page,", "load(v, v_cache, page,"),
    "maxima are forgotten": ("float shrink = exp2_fast(peaks[p] - higher);", "float shrink = 1;"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    """A wrong line makes a wrong number, a NaN, a counter that is not zero, or a report."""
    for name in ("hopper.h", "decode_one.cu"):
        (tmp_path / name).write_text((nvrtc.FOLDER / name).read_text())
    before, after = FAULTS[fault]
    text = (tmp_path / "decode_one.cu").read_text()
    assert before in text
    (tmp_path / "decode_one.cu").write_text(text.replace(before, after))
    emulator, cases = Emulator(tmp_path, tmp_path), [make(400), make(400, window=150), make(200)]

    def right(case: tuple[Tensors, dict[str, Any]], seed: int) -> bool:
        try:
            return is_right(*case, emulate(emulator, *case, splits=3, seed=seed), 3e-3)
        except (AssertionError, RuntimeError):
            return False

    assert not all(right(case, seed) for case in cases for seed in (4, 5))


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"D": 32, "page": 64}, {}),
        ({"group": 8}, {}),
        ({"page": 8}, {}),
        ({"dtype": torch.float32}, {}),
        ({}, {"scale": -1.0}),
    ],
)
def test_what_it_does_not_do_runs_one_by_one(options: dict[str, Any], changes: dict[str, Any]) -> None:
    tensors, attrs = make(20, **options)
    (kernel,) = cuda_kernels(OP)
    assert not kernel.candidates(op_call(OP, tensors, attrs | changes))


def test_heads_with_sinks_run_one_by_one() -> None:
    tensors, attrs = make(20)
    tensors["sinks"] = torch.zeros(int(attrs["heads"]))
    (kernel,) = cuda_kernels(OP)
    assert not kernel.candidates(op_call(OP, tensors, attrs))


def test_several_rows_run_one_by_one() -> None:
    tensors, attrs = make(20)
    shared = ("k_cache", "v_cache", "q_norm", "k_norm")
    two = {name: x if name in shared else torch.cat((x, x)) for name, x in tensors.items()}
    (kernel,) = cuda_kernels(OP)
    assert kernel.candidates(op_call(OP, tensors, attrs))
    assert not kernel.candidates(op_call(OP, two, attrs))
