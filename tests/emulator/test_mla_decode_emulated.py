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

pytestmark = [needs_compiler, pytest.mark.slow]
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
    """Rows of (queries, context with them), whose own latents are NaN; padding tokens around them."""
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
    "more blocks than keys": (decode([130], 16), 9),
    "rows that end with shares": (decode([128, 256, 128], 16), 4),
    "one block": (decode([200, 65], 16), 1),
    "many short rows": (decode([*([0] * 30), 3, *([0] * 9), 70, 1], 16), 2),
    "steep": (decode((300, 130), 16, steep=20.0), 2),
    "5 heads": (decode((65, 0, 200), 5), 2),
    "32 heads": (decode((1, 63, 0, 64, 65, 129), 32), 3),
    "float16, 12 heads, pages of 256": (decode((100, 513, 256), 12, 256, F16), 4),
    "128 heads": (decode((130, 0, 70), 128), 4),
    "extend": (extend([(5, 200), (3, 3), (0, 0), (1, 65), (9, 73)], 16), 3),
    "extend, 20 heads, pages of 128": (extend([(4, 400), (1, 1)], 20, 128), 5),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(emulator: Emulator, name: str) -> None:
    case, blocks = CASES[name]
    made = emulate(emulator, case, blocks=blocks, seed=list(CASES).index(name))
    assert error(case, made) < (5e-3 if case[1]["q"].dtype == B16 else 1e-3)


def test_order_does_not_matter(emulator: Emulator) -> None:
    """To the last bit: parts are added in the order of keys."""
    case = decode((300, 0, 65, 700), 16)
    first, *others = (emulate(emulator, case, seed=seed, blocks=5)["y"] for seed in (1, 2, 4))
    assert all(torch.equal(first, other) for other in others)


TALL = (
    decode((130, 200), 16),
    4,
)  # two blocks a share: the second has the end of a row and the start of another
LONG = decode((700,), 16), 1
ROWS = decode((65, 0, 130, 70), 16), 1
SHORT = decode((64, 3, 70, 64, 1, 20, 64, 30, 9, 64), 16), 1
SPREAD = decode((1000,), 16), 16
WIDE = decode((330, 65), 64), 1
MORE = extend([(9, 200), (2, 2)], 16), 2
FAULTS: dict[str, tuple[tuple[Case, int], str, str]] = {
    "an mbarrier is not arrived at": (LONG, "      give_back(free[1]);\n", ""),
    "bytes are miscounted": (TALL, "3 * 128 * (L - from)", "3 * 128 * L"),
    "a wait for keys is missing": (LONG, '    wait_full(bars.k, k, "score: k full");\n', ""),
    "keys are copied over those in use": (LONG, 'wait_free(bars.k, k, "feed: k free");\n', ""),
    "queries are copied over those in use": (SHORT, 'wait_free(bars.q, q, "feed: q free");\n', ""),
    "queries are not given back": (ROWS, "i == item.blocks - 1 && lane == 0", "i == -1 && lane == 0"),
    "weights are written over those in use": (WIDE, 'wait_free(bars.p, p, "score: p free");\n', ""),
    "sums are written over those in use": (SHORT, 'wait_free(bars.end, q, "score: end free");\n', ""),
    "results are not rescaled": (LONG, "o[d][2 * h + j] *= two.x[2 * (j & 1) + 1]", "o[d][2 * h + j] *= 1"),
    "slots without a token are seen": (TALL, "slot + s - empty, page", "slot + s, page"),
    "scores of empty slots count": (TALL, "if (empty > 0) {", "if (false) {"),
    "empty slots' values count": (TALL, "int from = (L - min(", "int from = 0 * (L - min("),
    "blocks lie elsewhere": (TALL, "(unit ^ (row & 7)) << 4", "(unit ^ (row & 3)) << 4"),
    "a row without keys is left": (ROWS, "if (sees) continue;", "continue;"),
    "parts of two rows share a place": (TALL, "(first ? 1 : 0)", "0"),
    "the last part is left out": (SPREAD, "parts = last - first + 1", "parts = last - first"),
    "parts are not rescaled": (SPREAD, "value[i] = value[i] * before", "value[i] = value[i]"),
    "parts are read before the wait": (TALL, "  dependence_wait();\n#endif\n  if (begin", "#endif\n  if (begin"),
    "registers that no warp gave back": (WIDE, "setmaxnreg_dec<FEED", "setmaxnreg_dec<8 + FEED"),
    "the other half's tiles": (WIDE, "int d = g * 3 + c - FIRST;", "int d = g * 3 + c - FIRST / 2;"),
    "tokens of a unit are miscounted": (MORE, "count = min(row.tokens - unit * TOKENS, ", "count = max(0, "),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(emulator: Emulator, fault: str, tmp_path: Path) -> None:
    """A wrong line makes a wrong number, a NaN, or a report of a deadlock."""
    (case, blocks), before, after = FAULTS[fault]
    changed = copy_sources(tmp_path, before, after)
    faulty = Emulator(tmp_path, tmp_path)
    if changed.name != "mla_shapes.h":
        faulty.take(emulator, but="mla_combine.cu" if changed.name == "mla_combine.cu" else "mla_decode.cu")

    def right(seed: int) -> bool:
        try:
            return error(case, emulate(faulty, case, seed=seed, blocks=blocks)) < 5e-3
        except (AssertionError, RuntimeError):
            return False

    assert not all(right(seed) for seed in (4, 5, 1004, 1005))


SOURCES = (
    *("hopper.h", "places.h", "wgmma.h", "mla_shapes.h", "mla_feed.h", "mla_wgmma.h"),
    *("mla_decode.cu", "mla_combine.cu"),
)


def copy_sources(folder: Path, before: str, after: str) -> Path:
    """Into ``folder``, with one change; the file that has it."""
    texts = {name: (nvrtc.FOLDER / name).read_text() for name in SOURCES}
    (changed,) = (name for name, text in texts.items() if before in text)
    for name, text in texts.items():
        (folder / name).write_text(text.replace(before, after))
    return folder / changed


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, Cut(8, 1, 1)),
        (8, Cut(8, 8, 1)),
        (16, Cut(16, 16, 1)),
        (20, Cut(32, 20, 1)),
        (64, Cut(64, 64, 1)),
        (128, Cut(64, 64, 2)),
        (96, None),
    ],
)
def test_heads_become_columns(heads: int, expected: Cut | None) -> None:
    assert cut(heads, extend=False) == expected


def test_tokens_fill_columns() -> None:
    assert cut(16, extend=True) == Cut(64, 16, 1, 4)
    assert cut(20, extend=True) == Cut(64, 20, 1, 3)
    assert cut(128, extend=True) == Cut(64, 64, 2, 1)


def test_what_it_does_not_do_is_others() -> None:
    contract, tensors, attrs = decode((5,), 16)
    (kernel,) = (k for k in cuda_kernels("mla_decode_attention") if k.name == "wgmma")
    call = op_call(contract.name, tensors, attrs)
    assert kernel.candidates(call)
    assert not kernel.candidates(replace(call, invariant=True))
    assert not kernel.candidates(replace(call, features=frozenset({"tma", "pdl"})))
    for changes in ({"rank": 448}, {"rope": 32}, {"scale": -1.0}, {"heads": 96}):
        assert not kernel.candidates(replace(call, attrs={**call.attrs, **changes}))
    for odd in (decode((5,), 16, 32), decode((5,), 16, 96)):
        assert not kernel.candidates(op_call(contract.name, *odd[1:]))
    narrow = tensors | {"cache": tensors["cache"].to(torch.float8_e4m3fn)}
    assert not kernel.candidates(op_call(contract.name, narrow, attrs))
    contract, tensors, attrs = extend([(3, 70)], 16)
    (kernel,) = (k for k in cuda_kernels("mla_extend_attention") if k.name == "wgmma")
    assert kernel.candidates(op_call(contract.name, tensors, attrs))
    assert not kernel.candidates(op_call(contract.name, tensors, {**attrs, "own": True}))


@pytest.mark.parametrize(
    ("rows", "context", "measured"), [(64, 4096, 86.7), (128, 4096, 165.2), (256, 4096, 315.4)]
)
def test_the_model_is_near_what_a_prototype_took(rows: int, context: int, measured: float) -> None:
    """Microseconds of 16 heads on one H200, which copies at 4.3 TB/s."""
    contract, tensors, attrs = decode((5,), 16)
    small = {
        "q": torch.empty(rows, 16 * WIDTH, dtype=B16, device="meta"),
        "cache": tensors["cache"].to("meta"),
        "page_table": torch.empty(rows, 64, dtype=torch.int32, device="meta"),
        "context_len": torch.empty(rows, dtype=torch.int32, device="meta"),
    }
    call = op_call(contract.name, small, attrs, context=context, bandwidth=4.3e12)
    assert abs(1e6 * candidate(call).seconds / measured - 1) < 0.1
