"""Attention kernels on the GPU against the references in float64.

Every cache slot that holds no token holds NaN, pages lie in random order, and padding rows and tokens are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu import launcher
from prepared import prepare

from makeready.kernels.attention import paged
from makeready.kernels.attention.decode_triton import decode_attention_cuda
from makeready.kernels.attention.extend_cuda import candidate as prefill
from makeready.kernels.attention.extend_cuda import schedules
from makeready.kernels.attention.extend_triton import extend_attention_cuda
from makeready.kernels.attention.qkv_triton import kv_write_cuda, norm_rope_kv_write_cuda
from makeready.kernels.attention.verify_triton import verify_attention_cuda
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.registry import Emit

assert isinstance(paged.decode_attention, Contract)
assert isinstance(paged.extend_attention, Contract)
assert isinstance(paged.verify_attention, Contract)
assert isinstance(paged.norm_rope_kv_write, Contract)
assert isinstance(paged.kv_write, Contract)

Tensors = dict[str, torch.Tensor]


def _paged(lengths: Sequence[int], page: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensors:
    a_row = [-(-length // page) for length in lengths]
    order = 1 + torch.randperm(sum(a_row)).cuda()
    table = torch.zeros(len(lengths), max(a_row) + 1, dtype=torch.int32, device="cuda")
    token = torch.cat(
        [torch.arange(n) + page * sum(a_row[:r]) for r, n in enumerate(lengths)]
    ).cuda()  # as if pages were in order
    for r, count in enumerate(a_row):
        table[r, :count] = order[sum(a_row[:r]) :][:count]
    tensors = {"page_table": table, "context_len": torch.tensor(lengths, dtype=torch.int32, device="cuda")}
    for name in ("k_cache", "v_cache"):
        cache = torch.full((1 + sum(a_row), page, kv_heads, head_dim), float("nan"), device="cuda")
        x = torch.randn(len(token), kv_heads, head_dim, device="cuda")
        cache.flatten(0, 1)[order[token // page] * page + token % page] = x
        tensors[name] = cache.to(dtype)
    return tensors


def _attrs(heads: int, kv_heads: int, head_dim: int, window: int) -> dict[str, float]:
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "window": window,
    }


_GEOMETRIES = (  # heads, KV heads, head size, page, window
    (4, 4, 32, 1, 0),
    (9, 3, 64, 16, 0),
    (8, 1, 80, 128, 0),
    (8, 2, 128, 64, 100),
    (16, 2, 128, 128, 0),
    (4, 2, 256, 24, 0),
)
_LENGTHS = (1, 63, 64, 65, 0, 1000, 127, 128, 129, 15, 16, 17, 0)
_ROWS = (  # (queries, context) of every row
    ((1, 1), (64, 64), (1, 1000), (0, 0), (63, 191), (65, 65), (1, 64), (130, 1030), (300, 300), (0, 0)),
    ((700, 700),),
    ((1, 900), (1, 1), (1, 128), (1, 129)),
)
_HEADS = (  # heads, KV heads, head size, rotated features, tokens, whether normalised
    (32, 8, 128, 128, 1, True),
    (32, 8, 128, 128, 777, True),
    (9, 3, 64, 64, 30, False),
    (4, 1, 80, 32, 64, True),
    (4, 4, 32, 24, 5, False),
    (4, 2, 256, 256, 3, True),
)

_LONG = (  # cut into parts, which are added up
    ((5, 9000),),
    ((1, 5000), (300, 300), (1, 7), (33, 1500)),
    ((512, 4000), (1, 1)),
)
_DRAFTS = (  # what rows that verify drafts have
    ((5, 1000),),
    ((3, 5000), (5, 65), (1, 1), (0, 0), (5, 5), (4, 129), (2, 64)),
    ((5, 700),) * 40,
)
F16, B16, F8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn

Case = tuple[Contract, Emit, Tensors, dict[str, float]]


def _activations(cache: torch.dtype) -> torch.dtype:
    return B16 if cache == F8 else cache


def _decode_case(lengths: Sequence[int], dtype: torch.dtype, heads: int, *geometry: int) -> Case:
    kv_heads, head_dim, page, window = geometry
    tensors = _paged(lengths, page, kv_heads, head_dim, dtype)
    tensors["q"] = torch.randn(len(lengths), heads * head_dim, device="cuda").to(_activations(dtype))
    tensors["q"][tensors["context_len"] == 0] = float("nan")
    return paged.decode_attention, decode_attention_cuda, tensors, _attrs(heads, kv_heads, head_dim, window)


def _extend_case(
    rows: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    heads: int,
    *geometry: int,
    queries: torch.dtype | None = None,
) -> Case:
    """Padding tokens, NaN, before and after the rows; ``queries`` are bf16 or what the cache is unless it is said."""
    kv_heads, head_dim, page, window = geometry
    queries = queries or _activations(dtype)
    tensors = _paged([context for _, context in rows], page, kv_heads, head_dim, dtype)
    count = torch.tensor([queries for queries, _ in rows], dtype=torch.int32, device="cuda")
    total = int(count.sum())
    q = torch.full((total + 40, heads * head_dim), float("nan"), dtype=queries, device="cuda")
    q[3 : 3 + total] = torch.randn(total, heads * head_dim, device="cuda").to(q.dtype)
    tensors |= {"q": q, "query_start": (3 + count.cumsum(0) - count).to(torch.int32), "query_len": count}
    return paged.extend_attention, extend_attention_cuda, tensors, _attrs(heads, kv_heads, head_dim, window)


def _verify_case(
    rows: Sequence[tuple[int, int]], each: int, dtype: torch.dtype, heads: int, *geometry: int
) -> Case:
    """Packed rows; the queries of tokens that no row has, behind them, are NaN."""
    _, _, tensors, attrs = _extend_case(rows, dtype, heads, *geometry)
    total = int(tensors["query_len"].sum())
    q = torch.full_like(tensors["q"][:1], float("nan")).repeat(each * len(rows), 1)
    q[:total] = tensors["q"][3 : 3 + total]
    moved = {"q": q, "query_start": tensors["query_start"] - 3}
    return paged.verify_attention, fitting, tensors | moved, attrs


def fitting(call: OpCall) -> list[Candidate]:
    """Ways that a plan may take: of the widest batches some spill, or all, and extend's stand in."""
    made = [way for way in verify_attention_cuda(call) if launcher.fits(way, call)]
    return made or list(extend_attention_cuda(call))[:1]


def _guarded(call: OpCall) -> list[Candidate]:
    """Prefill attention in CUDA C++ whose waits give up: a fault gives wrong numbers instead of a hang."""
    return [prefill(call, schedule, give_up=200_000) for schedule in schedules(call)]


def planned(call: OpCall) -> list[Candidate]:
    """Every way of prefill attention in CUDA C++."""
    return [prefill(call, schedule) for schedule in schedules(call)]


def prefill_case(
    emit: Emit,
    rows: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    heads: int,
    *geometry: int,
    queries: torch.dtype | None = None,
) -> Case:
    """In CUDA C++; queries are columns of the projection's output, pages before a row's window have other owners."""
    contract, _, tensors, attrs = _extend_case(rows, dtype, heads, *geometry, queries=queries)
    width = tensors["q"].shape[1]
    wide = torch.full((len(tensors["q"]), width + 512), float("nan"), device="cuda")
    columns = wide.to(tensors["q"].dtype)[:, :width]
    columns.copy_(tensors["q"])
    return contract, emit, tensors | {"q": columns}, attrs


def with_sinks(make: Callable[[], Case]) -> Case:
    """Of heads as gpt-oss has them: sinks far below all scores, among them and far above."""
    contract, emit, tensors, attrs = make()
    sinks = torch.linspace(-8, 12, int(attrs["heads"]), device="cuda")
    sinks[0], sinks[-1] = -300.0, 300.0
    return contract, emit, tensors | {"sinks": sinks}, attrs


def _qkv_case(
    heads: int, kv_heads: int, head_dim: int, rotary: int, tokens: int, normed: bool, dtype: torch.dtype = B16
) -> Case:
    width = (heads + 2 * kv_heads) * head_dim
    tensors = {
        "qkv": torch.randn(tokens, width + 64, device="cuda").bfloat16()[:, :width],
        "rows": torch.randn(tokens, rotary, device="cuda"),
        "kv_slot": torch.randperm(20 * 64)[:tokens].to(torch.int32).cuda(),
        "k_cache": torch.randn(20, 64, kv_heads, head_dim, device="cuda").to(dtype),
        "v_cache": torch.randn(20, 64, kv_heads, head_dim, device="cuda").to(dtype),
    }
    if normed:
        tensors |= {n: torch.randn(head_dim, device="cuda").bfloat16() for n in ("q_norm", "k_norm")}
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "eps": 1e-6}
    return paged.norm_rope_kv_write, norm_rope_kv_write_cuda, tensors, attrs


def _kv_case(dtype: torch.dtype) -> Case:
    _, _, tensors, _ = _qkv_case(3, 3, 80, 80, 77, False, dtype)
    operands = {name: tensors[name] for name in ("kv_slot", "k_cache", "v_cache")}
    operands |= {name: torch.randn(77, 3 * 80, device="cuda").bfloat16() for name in "kv"}
    return paged.kv_write, kv_write_cuda, operands, {"kv_heads": 3, "head_dim": 80}


_QWEN3_8B = (32, 8, 128, 64, 0)
_PREFILLS = (  # heads, KV heads, head size, page, window: of the kernel in CUDA C++
    _QWEN3_8B,
    (4, 4, 128, 64, 0),
    (4, 2, 128, 128, 0),
    (10, 2, 128, 64, 0),
    (6, 1, 128, 64, 0),
    (28, 4, 128, 256, 0),
    (64, 8, 128, 64, 0),
    (32, 8, 128, 64, 100),
    (32, 8, 128, 128, 1000),
)
_SIZES = (  # of heads of other sizes, and with 8-bit caches
    (32, 8, 64, 64, 0),
    (14, 2, 64, 128, 100),
    (16, 1, 64, 64, 0),
    (3, 3, 64, 64, 1000),
    (16, 8, 256, 64, 0),
    (8, 1, 256, 128, 100),
    (5, 1, 256, 64, 0),
)
_MANY = (*((1 + 7 * (r % 3), 1032 - r) for r in range(200)), (700, 5000), (0, 0))
# The first ones first, with waits that give up.
_CASES: dict[str, Callable[[], Case]] = {
    f"guarded-{rows}": partial(prefill_case, _guarded, rows, B16, *_QWEN3_8B)
    for rows in (((32, 32),), ((1, 1),), ((128, 128),), ((300, 300),), _ROWS[0])
}
_CASES |= {
    f"prefill-{kind}-{geometry}-{len(rows)}-{rows[0]}": partial(prefill_case, planned, rows, kind, *geometry)
    for kind in (B16, F16)
    for geometry in _PREFILLS
    for rows in (*_ROWS, *_LONG, *((_MANY,) if geometry == _QWEN3_8B else ()))
}
_CASES |= {
    f"guarded-{kind}-{geometry}-{rows}": partial(prefill_case, _guarded, rows, kind, *geometry)
    for kind, geometry in (
        (B16, _SIZES[0]),
        (B16, _SIZES[4]),
        (F8, _QWEN3_8B),
        (F8, _SIZES[0]),
        (F8, _SIZES[4]),
    )
    for rows in (((1, 1),), ((300, 300),), _ROWS[0])
}
_CASES |= {
    f"prefill-{kind}-{geometry}-{len(rows)}-{rows[0]}": partial(prefill_case, planned, rows, kind, *geometry)
    for kind, geometries in ((B16, _SIZES), (F16, _SIZES[::3]), (F8, (*_PREFILLS[::3], *_SIZES)))
    for geometry in geometries
    for rows in (*_ROWS, *_LONG, *((_MANY,) if geometry == _QWEN3_8B else ()))
}
_CASES |= {
    f"prefill-float16 queries-{geometry}": partial(
        prefill_case, planned, _ROWS[0], F8, *geometry, queries=F16
    )
    for geometry in (_QWEN3_8B, _SIZES[0], _SIZES[4])
}
_CASES |= {f"kv_write-{kind}": partial(_kv_case, kind) for kind in (B16, F8)}
_CASES |= {
    f"decode-{kind}-{len(lengths)}": partial(_decode_case, lengths, kind, *_QWEN3_8B)
    for kind, lengths in (
        (B16, _LENGTHS),
        (F16, _LENGTHS),
        (F8, _LENGTHS),
        (B16, (3000,)),
        (F8, (3000,)),
        (B16, (64,) * 70),
        (B16, (0, 0)),
    )
}
_CASES |= {
    f"extend-{kind}-{rows}": partial(_extend_case, rows, kind, *_QWEN3_8B)
    for kind in (B16, F8)
    for rows in _ROWS + _LONG
}
for _g in _GEOMETRIES:
    for _kind in (B16, F8):
        _CASES[f"decode-{_kind}-{_g}"] = partial(_decode_case, _LENGTHS, _kind, *_g)
        _CASES[f"extend-{_kind}-{_g}"] = partial(_extend_case, _ROWS[0], _kind, *_g)
        _CASES[f"long-{_kind}-{_g}"] = partial(_extend_case, _LONG[1], _kind, *_g)
_CASES |= {
    f"verify-{kind}-{len(rows)}-{rows[0]}-{geometry}-": partial(_verify_case, rows, 5, kind, *geometry)
    for kind in (B16, F16, F8)
    for rows in _DRAFTS
    for geometry in (_QWEN3_8B, (32, 4, 128, 64, 0), (64, 8, 64, 64, 128), (8, 4, 256, 64, 100))
}
_CASES |= {
    f"verify 9-{kind}-{g}": partial(_verify_case, ((9, 700), (7, 7), (1, 64)), 9, kind, *g)
    for kind in (B16, F8)
    for g in _GEOMETRIES
}
_CASES["verify-wide"] = partial(_verify_case, _DRAFTS[1], 5, B16, 16, 1, 128, 128, 0)
_CASES |= {
    f"sinks-{name}-{kind}-{window}": partial(with_sinks, partial(make, where, kind, 64, 8, 64, 64, window))
    for kind in (B16, F8)
    for window in (0, 128)
    for name, make, where in (
        ("prefill", partial(prefill_case, planned), _ROWS[0]),
        ("decode", _decode_case, _LENGTHS),
        ("long decode", _decode_case, (3000,)),
        ("verify", lambda rows, *more: _verify_case(rows, 5, *more), _DRAFTS[1]),
        ("extend", _extend_case, _ROWS[0]),
        ("long extend", _extend_case, _LONG[1]),
    )
}
_CASES |= {f"qkv-{kind}-{heads}": partial(_qkv_case, *heads, kind) for heads in _HEADS for kind in (B16, F8)}


def _emit(name: str, emit: Emit) -> Emit:
    """All candidates where the geometry is that of Qwen3-8B, else the first."""
    return emit if not any(name.endswith(str(g)) for g in _GEOMETRIES) else lambda call: emit(call)[:1]


@pytest.fixture(scope="module")
def kernels() -> None:
    """Everything compiled on all cores, which takes a minute one after the other."""
    work = []
    for name, make in _CASES.items():
        contract, emit, tensors, attrs = make()
        call = launcher.op_call(contract, tensors, attrs)
        work.append((call, _emit(name, emit)(call)))
    prepare(work)


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.usefixtures("kernels")
def test_against_the_reference(name: str) -> None:
    torch.manual_seed(0)
    contract, emit, tensors, attrs = _CASES[name]()
    launcher.check(contract, _emit(name, emit), tensors, attrs)


@pytest.mark.usefixtures("kernels")
def test_one_prefill_kernel_serves_a_bucket() -> None:
    """Launched over and over with one scratch, as in a plan, for other batches of one bucket and any grid."""
    torch.manual_seed(0)
    contract, _, tensors, attrs = prefill_case(planned, ((700, 700), (0, 0), (3, 900)), B16, *_QWEN3_8B)
    call = launcher.op_call(contract, tensors, attrs)
    way = prefill(call)
    scratch = launcher.new_scratch(way)
    for counts in ((700, 0, 3), (0, 0, 3), (1, 0, 1), (0, 0, 0), (700, 0, 3)):
        now = tensors | {"query_len": torch.tensor(counts, dtype=torch.int32, device="cuda")}
        for blocks in (132, 1, 7):
            (launch,) = way.launches
            launched = replace(way, launches=(replace(launch, grid=(blocks, 1, 1)),))
            y = launcher.run(launched, call, now, scratch=scratch)["y"]
            wide = {k: v.cpu().double() if v.is_floating_point() else v.cpu() for k, v in now.items()}
            want = contract.reference(**wide, **attrs)
            assert (y.cpu().double() - want).norm() <= 5e-3 * want.norm()


@pytest.mark.usefixtures("kernels")
def test_8_bits_saturate() -> None:
    """What is written equals the reference bit by bit, beyond the largest number too."""
    contract, emit, tensors, attrs = _kv_case(F8)
    for name in "kv":
        tensors[name] *= 300
        tensors[name][0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    call = launcher.op_call(contract, tensors, attrs)
    launcher.run(emit(call)[0], call, tensors)
    slot = tensors["kv_slot"].long()
    for name in "kv":
        held = tensors[f"{name}_cache"].view(torch.uint8).flatten(0, 1)[slot].flatten(1).cpu()
        wanted = paged.cached(tensors[name].cpu().float(), F8)
        assert (wanted.float().abs() == 448).sum() > 1000
        number = ~wanted.isnan()
        assert torch.equal(held[number], wanted.view(torch.uint8)[number])
        assert held.view(F8).float()[0, 2].isnan()


@pytest.mark.usefixtures("kernels")
def test_caches_beyond_two_billion_elements() -> None:
    """The same pages at the far end of a cache of 2.6e9 elements give the same bits."""
    contract, _, near, attrs = _extend_case(((1, 500), (200, 300)), B16, *_QWEN3_8B)
    pages, shift = len(near["k_cache"]), 40_000 - len(near["k_cache"])
    far = {**near, "page_table": near["page_table"] + shift}
    for name in ("k_cache", "v_cache"):
        far[name] = torch.empty(40_000, 64, 8, 128, dtype=torch.bfloat16, device="cuda")
        far[name][shift:] = near[name]
    _same(contract, extend_attention_cuda, near, far, attrs)
    unused = ("query_start", "query_len")
    one = [{k: v for k, v in s.items() if k not in unused} | {"q": s["q"][4:6]} for s in (near, far)]
    _same(paged.decode_attention, decode_attention_cuda, one[0], one[1], attrs)

    contract, emit, written, attrs = _qkv_case(32, 8, 128, 128, 64, True)
    slots = torch.randperm(pages * 64)[:64]
    written["kv_slot"] = slots.to(device="cuda", dtype=torch.int32)
    written |= {name: torch.zeros_like(near[name]) for name in ("k_cache", "v_cache")}
    call = launcher.op_call(contract, written, attrs)
    candidate = emit(call)[0]
    launcher.run(candidate, call, written)
    slot = written["kv_slot"].long()
    moved = {**far, **written, "kv_slot": written["kv_slot"] + 64 * shift}
    moved |= {name: far[name] for name in ("k_cache", "v_cache")}
    launcher.run(candidate, call, moved)
    for name in ("k_cache", "v_cache"):
        a, b = (x[name].flatten(0, 1) for x in (written, moved))
        assert torch.equal(a[slot], b[slot + 64 * shift])


def _same(contract: Contract, emit: Emit, near: Tensors, far: Tensors, attrs: dict[str, float]) -> None:
    made = []
    for tensors in (near, far):
        call = launcher.op_call(contract, tensors, attrs)
        made.append([launcher.run(candidate, call, tensors)["y"] for candidate in emit(call)])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)
