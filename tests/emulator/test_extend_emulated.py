"""Prefill attention in CUDA C++, emulated on the CPU, against the contract's reference in float64.

Every slot without a token is NaN, and so are pages before a row's window, padding queries and what columns of a
wider buffer lie between. Whatever was read without being a row's shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from emulated import Emulator, needs_compiler, op_call

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.attention import paged
from makeready.kernels.attention.extend_cuda import (
    Schedule,
    candidate,
    most_tiles,
)
from makeready.kernels.contract import Contract
from makeready.kernels.device import OpCall
from makeready.kernels.registry import cuda_kernels

pytestmark = [needs_compiler, pytest.mark.slow]
NAN = float("nan")
Rows = Sequence[tuple[int, int]]  # queries, context with them
Case = tuple[dict[str, torch.Tensor], dict[str, float]]
PLAIN = Schedule()
B16, F16, F8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
assert isinstance(paged.extend_attention, Contract)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def make(
    rows: Rows,
    group: int,
    page: int,
    window: int,
    dtype: torch.dtype,
    size: int = 128,
    cache_dtype: torch.dtype | None = None,
    *,
    kv_heads: int = 2,
    seed: int = 0,
) -> Case:
    """Operands and attributes; two padding tokens before the rows, one between, three behind."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    heads, needed = kv_heads * group, [-(-context // page) for _, context in rows]
    pages = 2 + sum(needed)
    caches = {name: torch.full((pages, page, kv_heads, size), NAN) for name in ("k_cache", "v_cache")}
    table = torch.full((len(rows), max(needed) + 2), pages - 1, dtype=torch.int32)
    order = (1 + torch.randperm(pages - 2, generator=random)).tolist()
    for r, ((queries, context), count) in enumerate(zip(rows, needed, strict=True)):
        mine, order = order[:count], order[count:]
        table[r, :count] = torch.tensor(mine, dtype=torch.int32)
        freed = max(context - queries - window + 1, 0) // page * page if window else 0
        for cache in caches.values():
            x = torch.full((count * page, kv_heads, size), NAN)
            x[freed:context] = normal(context - freed, kv_heads, size)
            cache[mine] = x.view(count, page, kv_heads, size)
    start, tokens = [], 2
    for r, (queries, _) in enumerate(rows):
        tokens += r == 1
        start.append(tokens)
        tokens += queries
    q = torch.full((tokens + 3, heads * size + 64), NAN)
    for (queries, _), first in zip(rows, start, strict=True):
        q[first : first + queries, : heads * size] = normal(queries, heads * size)
    numbers = {
        "query_start": start,
        "query_len": [queries for queries, _ in rows],
        "context_len": [context for _, context in rows],
    }
    tensors = {"q": q.to(dtype)[:, : heads * size], "page_table": table}
    tensors |= {name: cache.to(cache_dtype or dtype) for name, cache in caches.items()}
    tensors |= {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
    return tensors, {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": size,
        "scale": size**-0.5,
        "window": window,
    }


def error(tensors: dict[str, torch.Tensor], attrs: dict[str, float], y: torch.Tensor) -> float:
    """Of ``y``, relative, by Frobenius norms; NaN where it has one."""
    assert isinstance(paged.extend_attention, Contract)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    for name in ("k_cache", "v_cache"):  # the reference multiplies what a window hides by zero
        wide[name] = wide[name].nan_to_num()
    want = paged.extend_attention.reference(**wide, **attrs)
    assert not want.isnan().any()
    return float((y.double() - want).norm() / want.norm())


def emulate(
    emulator: Emulator, case: Case, schedule: Schedule = PLAIN, *, seed: int = 0, grid: int = 2
) -> torch.Tensor:
    tensors, attrs = case
    call = op_call("extend_attention", tensors, attrs, multiprocessors=grid)
    return emulator.run(candidate(call, schedule), call, tensors, seed=seed)["y"]


MIXED: Rows = [(1, 300), (40, 40), (0, 0), (3, 130), (64, 200), (1, 1)]
CASES = {
    "mixed": (MIXED, 4, 64, 0, B16),
    "one": ([(1, 1)], 4, 64, 0, B16),
    "edges": ([(32, 128), (33, 129), (31, 191), (64, 64), (1, 257)], 4, 64, 0, B16),
    "long": ([(70, 600)], 4, 64, 0, B16),
    "float16": (MIXED, 4, 64, 0, F16),
    "group1": ([(130, 200), (1, 65)], 1, 64, 0, B16),
    "group2": ([(70, 150), (64, 64)], 2, 64, 0, B16),
    "group8": ([(20, 150), (16, 16)], 8, 64, 0, B16),
    "group5": ([(30, 150), (25, 25)], 5, 64, 0, B16),
    "group7": ([(20, 300), (19, 19)], 7, 128, 0, B16),
    "group16": ([(9, 150), (8, 8), (1, 64)], 16, 64, 0, B16),
    "page256": (MIXED, 4, 256, 0, B16),
    "window": ([(200, 300), (5, 64), (1, 500), (64, 400)], 4, 64, 100, B16),
    "window1": ([(40, 140), (1, 129)], 4, 64, 1, B16),
    "window_long": ([(150, 700), (1, 333), (130, 130)], 4, 64, 256, B16),
    # Heads of 64: three warpgroups; rows that leave one or two of them without work.
    "size64": ([*MIXED, (49, 500)], 4, 64, 0, B16, 64),
    "size64_window": ([(100, 400), (5, 64), (1, 500)], 7, 64, 100, F16, 64),
    "size64_group1": ([(193, 200), (70, 70), (1, 129)], 1, 128, 0, B16, 64),
    # Heads of 256: steps of 64 keys, one place for queries.
    "size256": ([(33, 200), (1, 65), (40, 40), (1, 1)], 4, 64, 0, B16, 256),
    "size256_window": ([(70, 300), (5, 64), (1, 200)], 3, 128, 70, F16, 256),
    # 8-bit caches: three more warps work, products take float16.
    "narrow": (MIXED, 4, 64, 0, B16, 128, F8),
    "narrow_window": ([(60, 300), (1, 500), (64, 400)], 4, 64, 100, F16, 128, F8),
    "narrow64": ([*MIXED, (49, 500)], 8, 64, 0, B16, 64, F8),
    "narrow256": ([(33, 200), (1, 65), (40, 40), (1, 1)], 4, 64, 0, B16, 256, F8),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(emulator: Emulator, name: str) -> None:
    case = make(*CASES[name])
    allowed = 5e-3 if CASES[name][4] == B16 else 1e-3
    assert error(*case, emulate(emulator, case, seed=list(CASES).index(name))) < allowed


@pytest.mark.parametrize(
    ("schedule", "size"),
    [
        (Schedule(lazy=True, queries=True), 128),
        (Schedule(queries=True, early=True), 128),
        (Schedule(lazy=True), 64),
        (Schedule(lazy=True, early=True), 256),
    ],
    ids=lambda x: x.suffix if isinstance(x, Schedule) else str(x),
)
def test_schedules_against_the_reference(emulator: Emulator, schedule: Schedule, size: int) -> None:
    """Scores of a hundred, so that maxima rise by more than is let pass, and by less."""
    case = make(MIXED, 4, 64, 0, B16, size)
    case[0]["k_cache"].mul_(16)
    assert error(*case, emulate(emulator, case, schedule, seed=size)) < 5e-3


@pytest.mark.parametrize(
    ("schedule", "cache"),
    [
        (PLAIN, None),
        pytest.param(Schedule(lazy=True), None, marks=pytest.mark.slow),
        pytest.param(PLAIN, F8, marks=pytest.mark.slow),
    ],
    ids=["plain", "lazy", "narrow"],
)
def test_sinks_join_the_denominators(
    emulator: Emulator, schedule: Schedule, cache: torch.dtype | None
) -> None:
    """Heads as gpt-oss has them; sinks below all scores, among them and far above."""
    tensors, attrs = make([(9, 200), (1, 130)], 8, 64, 128, B16, 64, cache)
    tensors["sinks"] = torch.linspace(-8, 12, int(attrs["heads"]))
    tensors["sinks"][0], tensors["sinks"][-1] = -300.0, 300.0
    assert error(tensors, attrs, emulate(emulator, (tensors, attrs), schedule, seed=3)) < 5e-3


def test_order_and_number_of_blocks_do_not_matter(emulator: Emulator) -> None:
    """To the last bit: no tile is cut, and every launch leaves the counter for the next."""
    case = make(MIXED, 4, 64, 0, B16)
    ways = [emulate(emulator, case, seed=seed, grid=grid) for seed, grid in ((1, 1), (2, 3), (4, 5))]
    assert all(torch.equal(ways[0], other) for other in ways[1:])


def test_steps_without_a_row_give_zeros(emulator: Emulator) -> None:
    case = make([(0, 0), (0, 0)], 4, 64, 0, B16)
    y = emulate(emulator, case)
    assert len(y) > 3
    assert not y.any()


def test_rows_beyond_a_sweep_are_found(emulator: Emulator) -> None:
    """More rows than a warp has lanes, most of them empty."""
    rows = [(0, 0)] * 30 + [(3, 5)] + [(0, 0)] * 34 + [(2, 70), (1, 1)]
    case = make(rows, 4, 64, 0, B16)
    assert error(*case, emulate(emulator, case)) < 5e-3


TALL = make([(40, 400), (9, 70)], 4, 64, 0, B16)
THIRDS = make([(60, 300), (9, 70)], 4, 64, 0, B16, 64)
WIDE = make([(40, 200), (33, 70), (2, 130)], 4, 64, 0, B16, 256)
NARROW = make([(40, 400), (9, 70)], 4, 64, 0, B16, 128, F8)
SPARSE = make([(0, 0)] * 33 + [(3, 70), (5, 5)], 4, 64, 0, B16)
STEEP = make([(40, 400), (9, 70)], 4, 64, 0, B16)
STEEP[0]["k_cache"].mul_(16)
FAULTS: dict[str, tuple[Case, str, str]] = {
    "an mbarrier is not arrived at": (
        TALL,
        "      give_back(&bars.v.free[v.place()]);\n      v.next();\n      pack",
        "      v.next();\n      pack",
    ),
    "bytes are miscounted": (TALL, "slots * COPIES * LINE", "slots * COPIES * LINE - 128"),
    "a wait for values is missing": (TALL, 'wait_full(bars.v, v, "attend: v full");\n      issue', "issue"),
    "a wait for what is free is missing": (
        TALL,
        'wait_free(places, ring, "feed: free");\n',
        "",
    ),
    "weights are packed too early": (
        TALL,
        "      wgmma_wait<0>();\n      keep(o);\n      give_back(&bars.v.free[v.place()]);\n      v.next();\n"
        "      pack(p, s);\n",
        "      pack(p, s);\n      wgmma_wait<0>();\n      keep(o);\n      give_back(&bars.v.free[v.place()]);\n"
        "      v.next();\n",
    ),
    "sums are not rescaled": (TALL, "o[i] *= shrink[(i >> 1) & 1]", "o[i] *= 1"),
    "the next token is seen": (TALL, "at_key <= position_a", "at_key <= position_a + 1"),
    "slots without a token are seen": (TALL, "first % PAGE - at.empty[run]", "first % PAGE"),
    "empty slots keep what was there": (TALL, "if (VALUE && at.empty[0]", "if (false && at.empty[0]"),
    "empty 8-bit slots are widened": (NARROW, "bool copied = ", "bool copied = true || "),
    "the counter is left": (TALL, "*counter = 0;", ";"),
    "padding is left": (TALL, "if (total >= tokens) return;", "return;"),
    "a turn is not passed on": (TALL, "next_turn();\n      wgmma_wait<1>();", "wgmma_wait<1>();"),
    "queries of another head": (TALL, "item.head * GROUP, item.token)", "item.head, item.token)"),
    "a half lies elsewhere": (TALL, "operand_128b(KV_CHUNK, 1024)", "operand_128b(1024, KV_CHUNK)"),
    "a warpgroup without tokens keeps values": (
        TALL,
        'wait_full(bars.v, v, "skip: v full");\n        give_back(&bars.v.free[v.place()]);\n',
        "",
    ),
    "the search forgets the rows behind it": (SPARSE, "from.base += __shfl_sync(~0u, end, 31);", "from.base = 1;"),
    "the third warpgroup has no turn": (THIRDS, "(half + 1) % MATH", "(half + 1) % 2"),
    "queries are copied over those in use": (
        WIDE,
        'wait_free(bars.q, q, "feed: q free");\n',
        "",
    ),
    "queries keep 16 bits of another type": (NARROW, "if (CACHE8 && BF16_IO) narrow", "if (false) narrow"),
    "8-bit keys are copied over those in use": (
        NARROW,
        'wait_free(bars.raw, raw, "feed: raw free");\n',
        "",
    ),
    "keys are widened over those in use": (
        NARROW,
        'wait_free(places, ring, "widen: free");\n',
        "",
    ),
    "widened keys lie elsewhere": (NARROW, "turned = (slot & 7) << 4", "turned = (slot & 3) << 4"),
    "registers that no warp gave back are waited for": (
        NARROW,
        "setmaxnreg_dec<FEED_REGISTERS>",
        "setmaxnreg_dec<FEED_REGISTERS + 8>",
    ),
    "lazy sums are not rescaled": (STEEP, "if (!__any_sync(~0u, ", "if (true || !__any_sync(~0u, "),
}  # fmt: skip


def copy_sources(folder: Path, before: str, after: str) -> None:
    """Into ``folder``, with one change to the kernel."""
    found = (*nvrtc.FOLDER.glob("[hp]*.h"), nvrtc.FOLDER / "prefill.cu")  # hopper.h, places.h, prefill_*.h
    texts = {path: path.read_text() for path in found}
    assert sum(before in text for text in texts.values()) == 1
    for path, text in texts.items():
        (folder / path.name).write_text(text.replace(before, after))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    """A wrong line makes a wrong number, a NaN, a counter that is not zero, or a report of a deadlock."""
    case, before, after = FAULTS[fault]
    copy_sources(tmp_path, before, after)
    emulator, schedule = Emulator(tmp_path, tmp_path), Schedule(lazy=fault.startswith("lazy"))

    def right(seed: int) -> bool:
        try:
            return error(*case, emulate(emulator, case, schedule, seed=seed)) < 5e-3
        except (AssertionError, RuntimeError):
            return False

    assert not all(right(seed) for seed in (4, 5))


def test_a_deadlock_says_where_everybody_is(tmp_path: Path) -> None:
    copy_sources(tmp_path, "          tma_3d(smem", "          if (c == 0) tma_3d(smem")
    case = make([(3, 3)], 4, 64, 0, B16, kv_heads=1)
    with pytest.raises(
        RuntimeError, match=r"deadlock: .* warp 4 at attend: q full; .* warp 11 at attend: q full"
    ):
        emulate(Emulator(tmp_path, tmp_path), case, grid=1)


def _call(rows: int, tokens: int, *, context: int = 1024, **changes: object) -> OpCall:
    tensors, attrs = make([(1, 1)], 4, 64, 0, B16, kv_heads=8)
    small = {
        "q": torch.empty(tokens, 32 * 128, dtype=B16, device="meta"),
        "page_table": torch.empty(rows, 200, dtype=torch.int32, device="meta"),
    }
    each = ("query_start", "query_len", "context_len")
    small |= {name: torch.empty(rows, dtype=torch.int32, device="meta") for name in each}
    small |= {name: tensors[name].to("meta") for name in ("k_cache", "v_cache")}
    return op_call("extend_attention", small, attrs | changes, context=context)


@pytest.mark.parametrize(
    ("rows", "tokens", "context", "measured"),
    [(1, 1024, 1024, 21.5), (1, 4096, 4096, 231.9), (1, 8192, 8192, 934.4), (1, 16384, 16384, 3712.2)],
)
def test_the_model_is_what_was_measured(rows: int, tokens: int, context: int, measured: float) -> None:
    """On one H200, in microseconds; its matrix rate is the H100's by which others are scaled, within 2 %."""
    way = candidate(_call(rows, tokens, context=context))
    assert abs(1e6 * way.seconds / measured - 1) < 0.08


def test_the_grid_has_no_block_without_work() -> None:
    assert most_tiles(1, 32, 32) == 1
    assert most_tiles(5, 5, 32) == 5
    assert most_tiles(2, 33, 32) == 2
    assert candidate(_call(1, 1)).launches[0].grid == (8, 1, 1)
    assert candidate(_call(256, 8192)).launches[0].grid == (132, 1, 1)


def test_long_rows_are_its_and_short_ones_triton_s() -> None:
    """The implementation whose best way should be the faster comes first in a plan."""
    pytest.importorskip("triton")
    import makeready.kernels.attention.extend_triton  # noqa: F401

    def best(call: OpCall) -> str:
        ways = [(k.candidates(call)[0].seconds, k.name) for k in cuda_kernels("extend_attention")]
        assert len(ways) == 2
        return min(ways)[1]

    assert [best(_call(256, n)) for n in (1024, 2048, 8192)] == ["prefill"] * 3
    assert best(_call(256, 512, context=8192)) == "prefill"
    assert best(_call(256, 256)) == "tiles"  # as good as all rows have one token
    assert best(_call(1, 64, context=8192)) == "tiles"  # whose keys it shares out among multiprocessors


@pytest.mark.parametrize(
    ("group", "page", "dtype", "changes"),
    [
        (4, 32, B16, {}),
        (4, 96, B16, {}),
        (9, 64, B16, {}),
        (17, 64, B16, {}),
        (4, 64, torch.float32, {}),
        (4, 64, B16, {"scale": -1.0}),
    ],
)
def test_what_it_does_not_do_is_triton_s(
    group: int, page: int, dtype: torch.dtype, changes: dict[str, float]
) -> None:
    tensors, attrs = make([(1, 1)], group, page, 0, dtype)
    call = op_call("extend_attention", tensors, attrs | changes)
    (kernel,) = (k for k in cuda_kernels("extend_attention") if k.name == "prefill")
    assert not kernel.candidates(call)


def test_deterministic_plans_are_triton_s() -> None:
    from dataclasses import replace

    tensors, attrs = make([(1, 1)], 4, 64, 0, B16)
    (kernel,) = (k for k in cuda_kernels("extend_attention") if k.name == "prefill")
    call = op_call("extend_attention", tensors, attrs)
    assert kernel.candidates(call)
    assert not kernel.candidates(replace(call, invariant=True))
    assert not kernel.candidates(replace(call, features=frozenset({"tma", "pdl", "fp8"})))
    narrow = tensors | {name: tensors[name].to(F8) for name in ("q", "k_cache", "v_cache")}
    assert not kernel.candidates(op_call("extend_attention", narrow, attrs))
