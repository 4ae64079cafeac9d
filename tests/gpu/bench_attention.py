"""Attention of Qwen3-8B on the present GPU, beside its floors and PyTorch's attention over unpaged copies.

    python tests/gpu/bench_attention.py           what plans carry, and PyTorch's attention
    python tests/gpu/bench_attention.py sweep     more ways to cut the work, for the cost model

All ways are held to the references first. Caches rotate, so that a small one is not left in L2 when its turn
comes again; pages lie in random order. Results go as JSON to the folder $OUT, or the present one.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))

import launcher

from makeready.kernels.attention import decode_triton, extend_tiling, extend_triton, paged
from makeready.kernels.attention.qkv_triton import norm_rope_kv_write_cuda
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall

assert isinstance(paged.decode_attention, Contract)
assert isinstance(paged.extend_attention, Contract)
assert isinstance(paged.norm_rope_kv_write, Contract)

BANDWIDTH, RATE = 3.0e12, 779e12  # measured on an H100: device copy in bytes/s, bf16 product in operations/s
ROTATED = 200e6  # bytes that calls rotate over; L2 has 50 MiB
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
ATTRS = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "scale": HEAD_DIM**-0.5, "window": 0}
QKV_ATTRS = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "eps": 1e-6}
B16, F8 = torch.bfloat16, torch.float8_e4m3fn

Tensors = dict[str, torch.Tensor]
Row = tuple[int, int]  # queries, context
Emit = Callable[[OpCall], Sequence[Candidate]]

MIXED_LENGTHS = [(1, 64 * (i + 1)) for i in range(64)]
DECODES = (
    *([(1, 1024)] * n for n in (1, 4, 16, 64, 256)),
    [(1, 32_768)],
    [(1, 4096)] * 16,
    MIXED_LENGTHS,
)
DECODES_F8 = (*([(1, 1024)] * n for n in (1, 16, 64, 256)), [(1, 32_768)])
PADDING = [(0, 0)] * 255
EXTENDS = (
    [(64, 1024)],
    [(256, 1024)],
    [(1024, 1024)],
    [(1024, 1024), *PADDING],
    [(8000, 8000)],
    [(1000, 1000)] * 8,
    [(1, 1024)] * 64 + [(2000, 2000)],
    [(1, 32_768), (2000, 2000)],
    [(512, 8192)],
    [(16, 8192)],
)
EXTENDS_F8 = ([(1024, 1024)], [(8000, 8000)], [(1, 1024)] * 64 + [(2000, 2000)], [(512, 8192)])
UNSWEPT = ([(1, 1024)] * 4, [(1, 4096)] * 16, [(1024, 1024)], [(1000, 1000)] * 8, [(1, 32_768), (2000, 2000)])
CHECKED = [(5, 700), (1, 3000), (130, 130), (0, 0), (300, 400)]
TOKENS = (1, 16, 64, 256, 1024, 8192)


def kv_bytes(kind: torch.dtype) -> int:
    """Of a token's keys and values."""
    return 2 * kind.itemsize * KV_HEADS * HEAD_DIM


def _paged(rows: Sequence[Row], kind: torch.dtype) -> Tensors:
    pages = [-(-context // PAGE) for _, context in rows]
    order = (1 + torch.randperm(sum(pages))).to(torch.int32).cuda()
    table = torch.zeros(len(rows), max(pages), dtype=torch.int32, device="cuda")
    for r, count in enumerate(pages):
        table[r, :count] = order[sum(pages[:r]) :][:count]
    shape = (1 + sum(pages), PAGE, KV_HEADS, HEAD_DIM)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda").to(kind) for _ in "kv")
    context = torch.tensor([context for _, context in rows], dtype=torch.int32, device="cuda")
    return {"k_cache": k, "v_cache": v, "page_table": table, "context_len": context}


def _operands(rows: Sequence[Row], kind: torch.dtype, *, decode: bool) -> Tensors:
    count = torch.tensor([queries for queries, _ in rows], dtype=torch.int32, device="cuda")
    tokens = len(rows) if decode else int(count.sum())
    q = torch.randn(tokens, HEADS * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    tensors = {**_paged(rows, kind), "q": q}
    if not decode:
        tensors |= {"query_start": (count.cumsum(0) - count).to(torch.int32), "query_len": count}
    return tensors


def floor(rows: Sequence[Row], kind: torch.dtype) -> float:
    """Seconds that no kernel beats: all keys and values once, or all operations."""
    nbytes = sum(kv_bytes(kind) * context + 4 * queries * HEADS * HEAD_DIM for queries, context in rows)
    return max(nbytes / BANDWIDTH, operations(rows) / RATE)


def operations(rows: Sequence[Row]) -> float:
    """Multiplications and additions over visible pairs."""
    pairs = sum(queries * context - queries * (queries - 1) // 2 for queries, context in rows)
    return 4.0 * pairs * HEADS * HEAD_DIM


def sdpa(rows: Sequence[Row], copies: int) -> tuple[float, str]:
    """Least seconds of PyTorch's attention over dense equal rows, and the backend; inf where rows differ."""
    rows = [row for row in rows if row != (0, 0)]
    queries, context = rows[0]
    if any(row != rows[0] for row in rows) or queries not in (1, context):
        return float("inf"), ""
    shapes = (HEADS, queries), (KV_HEADS, context), (KV_HEADS, context)
    sets = [
        [torch.randn(len(rows), h, n, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for h, n in shapes]
        for _ in range(copies)
    ]
    least = float("inf"), ""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        rounds = -(-20 // copies)

        def calls(rounds: int = rounds) -> None:
            for q, k, v in sets * rounds:
                functional.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

        try:
            with sdpa_kernel(backend):
                took = launcher.time_graph(calls) / (rounds * copies)
        except RuntimeError:  # this backend does not take these shapes
            continue
        least = min(least, (took, backend.name.partition("_")[0].lower()))
    return least


def decode_ways(call: OpCall) -> list[Candidate]:
    """More ways than plans carry."""
    narrow = call.tensors["k_cache"].dtype == "float8_e4m3fn"
    sizes = [(32, 4), (64, 4), (64, 8), (128, 8)]
    made = []
    for (keys, warps), stages, blocks in itertools.product(sizes, (3, 4, 6), (1, 2, 3)):
        held = 2 * keys * HEAD_DIM * (1 if narrow else 2) * (stages - 1) * blocks
        if held <= call.shared_bytes - 8192 * blocks and warps * blocks <= 16:
            made.append(decode_triton.candidate(call, keys, warps, stages, blocks))
    return made


def extend_ways(call: OpCall) -> list[Candidate]:
    """More ways than plans carry; registers do not suffice for rounds with tiles of 128 and 4 warps."""
    ways: list[extend_tiling.Way] = []
    for way in extend_tiling.ways(call):
        ways += [replace(way, least=least) for least in (128, 256, 512)]
        ways += [replace(way, rounds=False), replace(way, rounds=False, stages=way.stages + 1)]
        if way.warps == 8 or way.m == 64:
            ways.append(replace(way, stages=way.stages + 1))
    made = {}
    for way in ways:
        candidate = extend_triton.candidate(call, way)
        made.setdefault(way, replace(candidate, name=f"{candidate.name}_l{way.least}"))
    return list(made.values())


def check(ways: Mapping[str, Emit]) -> None:
    """Hold every way that is timed to the references in float64."""
    for kind in (B16, F8):
        rows = [(min(queries, 1), context) for queries, context in CHECKED]
        decode = _operands(rows, kind, decode=True)
        extend = _operands(CHECKED, kind, decode=False)
        for contract, tensors in ((paged.decode_attention, decode), (paged.extend_attention, extend)):
            assert isinstance(contract, Contract)
            emit = ways[contract.name]
            launcher.check(
                contract, lambda c, emit=emit: [w for w in emit(c) if launcher.fits(w, c)], tensors, ATTRS
            )


def _label(rows: Sequence[Row], kind: torch.dtype) -> str:
    some = [row for row in rows if row != (0, 0)]
    text = f"{len(some)} x {some[0]}" if some[0] == some[-1] else f"{len(some)}: {some[0]}..{some[-1]}"
    return f"{'f8' if kind == F8 else 'bf16'} {text}" + (" of 256" if len(some) < len(rows) else "")


def _bench_rows(contract: Contract, emit: Emit, rows: Sequence[Row], kind: torch.dtype, peers: bool) -> dict:
    decode = contract.name == "decode_attention"
    nbytes = kv_bytes(kind) * sum(context for _, context in rows)
    copies = max(2, min(8, round(ROTATED / nbytes + 0.5)))
    sets = [_operands(rows, kind, decode=decode) for _ in range(copies)]
    call = launcher.op_call(contract, sets[0], ATTRS)
    other, backend = sdpa(rows, copies) if peers and kind == B16 else (float("inf"), "")
    times = [(launcher.time(way, call, sets), way.name) for way in emit(call) if launcher.fits(way, call)]
    took, chosen = times[0]
    best, best_name = min(times)
    print(
        f"{_label(rows, kind):36s} {chosen:26s} {took * 1e6:8.1f} {floor(rows, kind) / took:6.2f} "
        f"{nbytes / took / 1e12:5.2f} {operations(rows) / took / 1e12:7.0f} {other * 1e6:8.1f} {backend:6s}"
        f"{best * 1e6:8.1f} {best_name:26s}"
        + "  ".join(f"{t * 1e6:.1f} {n}" for t, n in sorted(times)[1:4] if n != chosen),
        flush=True,
    )
    return {
        "rows": _label(rows, kind),
        "op": contract.name,
        "floor_us": floor(rows, kind) * 1e6,
        "sdpa_us": other * 1e6 if backend else None,
        "us": {name: t * 1e6 for t, name in times},
    }


def _qkv_operands(tokens: int, kind: torch.dtype, copies: int) -> list[Tensors]:
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    pages = 1 + -(-tokens // PAGE)
    cache = torch.zeros(pages, PAGE, KV_HEADS, HEAD_DIM, device="cuda").to(kind)
    return [
        {
            "qkv": torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda"),
            "rows": torch.randn(tokens, HEAD_DIM, device="cuda"),
            "q_norm": torch.randn(HEAD_DIM, dtype=torch.bfloat16, device="cuda"),
            "k_norm": torch.randn(HEAD_DIM, dtype=torch.bfloat16, device="cuda"),
            "kv_slot": (PAGE + torch.arange(tokens, dtype=torch.int32)).cuda(),
            "k_cache": cache.clone(),
            "v_cache": cache.clone(),
        }
        for _ in range(copies)
    ]


def _bench_qkv(tokens: int, kind: torch.dtype) -> None:
    moved = tokens * (2 * (2 * HEADS + 2 * KV_HEADS) + 4) * HEAD_DIM + tokens * kv_bytes(kind)
    sets = _qkv_operands(tokens, kind, max(2, min(64, round(ROTATED / moved + 0.5))))
    call = launcher.op_call(paged.norm_rope_kv_write, sets[0], QKV_ATTRS)
    times = [(launcher.time(way, call, sets), way.name) for way in norm_rope_kv_write_cuda(call)]
    took, chosen = times[0]
    label = f"{'f8' if kind == F8 else 'bf16'} norm_rope_kv_write {tokens}"
    print(
        f"{label:36s} {chosen:26s} {took * 1e6:8.1f} {moved / BANDWIDTH / took:6.2f} {moved / took / 1e12:5.2f}  "
        + "  ".join(f"{t * 1e6:.1f} {n}" for t, n in times[1:]),
        flush=True,
    )


def _prepare(work: Iterable[tuple[Contract, Emit, Sequence[Row], torch.dtype]]) -> None:
    """Compile on all cores what is about to run."""
    calls = []
    for contract, emit, rows, kind in work:
        tensors = _operands(rows, kind, decode=contract.name == "decode_attention")
        call = launcher.op_call(contract, tensors, ATTRS)
        calls.append((call, emit(call)))
    for kind, tokens in itertools.product((B16, F8), (1, 8192)):
        call = launcher.op_call(paged.norm_rope_kv_write, _qkv_operands(tokens, kind, 1)[0], QKV_ATTRS)
        calls.append((call, norm_rope_kv_write_cuda(call)))
    launcher.prepare(calls)


def bench(sweep: bool) -> None:
    """Check, then print the first way's time, its share of the floor, and the best of the others."""
    decode, extend = paged.decode_attention, paged.extend_attention
    assert isinstance(decode, Contract)
    assert isinstance(extend, Contract)
    ways: dict[str, Emit] = {
        "decode_attention": decode_ways if sweep else decode_triton.decode_attention_cuda,
        "extend_attention": extend_ways if sweep else extend_triton.extend_attention_cuda,
    }
    rows = [(decode, r, B16) for r in DECODES] + [(decode, r, F8) for r in DECODES_F8]
    rows += [(extend, r, B16) for r in EXTENDS] + [(extend, r, F8) for r in EXTENDS_F8]
    if sweep:
        rows = [(contract, r, kind) for contract, r, kind in rows if r not in UNSWEPT]
    work = [(contract, ways[contract.name], r, kind) for contract, r, kind in rows]
    _prepare(work)
    check(ways)
    print(
        "dtype rows x (queries, context)      chosen                           µs  floor  TB/s TFLOP/s  SDPA µs"
        "         best µs                              others"
    )
    made = [_bench_rows(*one, peers=not sweep) for one in work]
    if not sweep:
        for kind, tokens in itertools.product((B16, F8), TOKENS):
            _bench_qkv(tokens, kind)
    name = "bench_attention_sweep.json" if sweep else "bench_attention.json"
    path = Path(os.environ.get("OUT", ".")) / name
    path.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": made}, indent=1))


if __name__ == "__main__":
    bench("sweep" in sys.argv[1:])
