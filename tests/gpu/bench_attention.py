"""Attention of Qwen3-8B on the present GPU, beside its floors and PyTorch's attention over unpaged copies.

    python tests/gpu/bench_attention.py

Caches rotate, so that a small one is not left in L2 when its turn comes again; pages lie in random order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))

import launcher

from makeready.kernels.attention import paged
from makeready.kernels.attention.decode_triton import decode_attention_cuda
from makeready.kernels.attention.extend_triton import extend_attention_cuda
from makeready.kernels.attention.qkv_triton import norm_rope_kv_write_cuda
from makeready.kernels.contract import Contract
from makeready.kernels.device import OpCall

assert isinstance(paged.decode_attention, Contract)
assert isinstance(paged.extend_attention, Contract)
assert isinstance(paged.norm_rope_kv_write, Contract)

BANDWIDTH, RATE = 3.0e12, 779e12  # measured on an H100: device copy in bytes/s, bf16 product in operations/s
ROTATED = 200e6  # bytes that calls rotate over; L2 has 50 MiB
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
ATTRS = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "scale": HEAD_DIM**-0.5, "window": 0}
KV_BYTES = 4 * KV_HEADS * HEAD_DIM  # of a token

Tensors = dict[str, torch.Tensor]
Row = tuple[int, int]  # queries, context

DECODES = (*([(1, 1024)] * n for n in (1, 4, 16, 64, 256)), [(1, 32_768)], [(1, 4096)] * 16)
MIXED_LENGTHS = [(1, 64 * (i + 1)) for i in range(64)]
EXTENDS = (
    [(1024, 1024)],
    [(8000, 8000)],
    [(1000, 1000)] * 8,
    [(1, 1024)] * 64 + [(2000, 2000)],
    [(512, 8192)],
)
TOKENS = (1, 16, 64, 256, 1024, 8192)


def _paged(rows: Sequence[Row]) -> Tensors:
    pages = [-(-context // PAGE) for _, context in rows]
    order = (1 + torch.randperm(sum(pages))).to(torch.int32).cuda()
    table = torch.zeros(len(rows), max(pages), dtype=torch.int32, device="cuda")
    for r, count in enumerate(pages):
        table[r, :count] = order[sum(pages[:r]) :][:count]
    shape = (1 + sum(pages), PAGE, KV_HEADS, HEAD_DIM)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    context = torch.tensor([context for _, context in rows], dtype=torch.int32, device="cuda")
    return {"k_cache": k, "v_cache": v, "page_table": table, "context_len": context}


def _operands(rows: Sequence[Row], *, decode: bool) -> Tensors:
    count = torch.tensor([queries for queries, _ in rows], dtype=torch.int32, device="cuda")
    q = torch.randn(int(count.sum()), HEADS * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    tensors = {**_paged(rows), "q": q}
    if not decode:
        tensors |= {"query_start": (count.cumsum(0) - count).to(torch.int32), "query_len": count}
    return tensors


def floor(rows: Sequence[Row]) -> float:
    """Seconds that no kernel beats: all keys and values once, or all operations."""
    nbytes = sum(KV_BYTES * context + 4 * queries * HEADS * HEAD_DIM for queries, context in rows)
    return max(nbytes / BANDWIDTH, operations(rows) / RATE)


def operations(rows: Sequence[Row]) -> float:
    """Multiplications and additions over visible pairs."""
    pairs = sum(queries * context - queries * (queries - 1) // 2 for queries, context in rows)
    return 4.0 * pairs * HEADS * HEAD_DIM


def sdpa(rows: Sequence[Row], copies: int) -> tuple[float, str]:
    """Least seconds of PyTorch's attention over dense equal rows, and the backend; inf where rows differ."""
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


def _bench_rows(contract: Contract, emit: Callable[[OpCall], Sequence], rows: Sequence[Row]) -> None:
    decode = contract.name == "decode_attention"
    copies = max(2, min(8, round(ROTATED / (KV_BYTES * sum(context for _, context in rows)) + 0.5)))
    sets = [_operands(rows, decode=decode) for _ in range(copies)]
    call = launcher.op_call(contract, sets[0], ATTRS)
    other, backend = sdpa(rows, copies)
    times = [(launcher.time(way, call, sets), way.name) for way in emit(call)]
    took, chosen = times[0]
    label = f"{len(rows)} x {rows[0]}" if rows[0] == rows[-1] else f"{len(rows)}: {rows[0]}..{rows[-1]}"
    nbytes = KV_BYTES * sum(context for _, context in rows)
    print(
        f"{label:32s} {chosen:24s} {took * 1e6:8.1f} {floor(rows) / took:6.2f} {nbytes / took / 1e12:5.2f} "
        f"{operations(rows) / took / 1e12:7.0f} {other * 1e6:8.1f} {backend:6s}"
        + "  ".join(f"{t * 1e6:.1f} {n}" for t, n in sorted(times) if n != chosen),
        flush=True,
    )


def _qkv_operands(tokens: int, copies: int) -> list[Tensors]:
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    pages = 1 + -(-tokens // PAGE)
    return [
        {
            "qkv": torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda"),
            "rows": torch.randn(tokens, HEAD_DIM, device="cuda"),
            "q_norm": torch.randn(HEAD_DIM, dtype=torch.bfloat16, device="cuda"),
            "k_norm": torch.randn(HEAD_DIM, dtype=torch.bfloat16, device="cuda"),
            "kv_slot": (PAGE + torch.arange(tokens, dtype=torch.int32)).cuda(),
            "k_cache": torch.zeros(pages, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda"),
            "v_cache": torch.zeros(pages, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda"),
        }
        for _ in range(copies)
    ]


def bench() -> None:
    """Print the first candidate's time, its share of the floor, and the times of the others."""
    decode, extend = paged.decode_attention, paged.extend_attention
    assert isinstance(decode, Contract)
    assert isinstance(extend, Contract)
    work = [(decode, decode_attention_cuda, rows) for rows in (*DECODES, MIXED_LENGTHS)]
    work += [(extend, extend_attention_cuda, rows) for rows in EXTENDS]
    calls = [
        launcher.op_call(contract, _operands(rows, decode=contract is decode), ATTRS)
        for contract, _, rows in work
    ]
    launcher.prepare((call, emit(call)) for call, (_, emit, _) in zip(calls, work, strict=True))
    print(
        "rows x (queries, context)        chosen                         µs  floor  TB/s TFLOP/s  SDPA µs      others"
    )
    for contract, emit, rows in work:
        _bench_rows(contract, emit, rows)
    for tokens in TOKENS:
        moved = tokens * (2 * 2 * (HEADS + 2 * KV_HEADS) + 4) * HEAD_DIM
        sets = _qkv_operands(tokens, max(2, min(64, round(ROTATED / moved + 0.5))))
        attrs = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "eps": 1e-6}
        assert isinstance(paged.norm_rope_kv_write, Contract)
        call = launcher.op_call(paged.norm_rope_kv_write, sets[0], attrs)
        times = [(launcher.time(way, call, sets), way.name) for way in norm_rope_kv_write_cuda(call)]
        took, chosen = times[0]
        print(
            f"norm_rope_kv_write {tokens:5d} tokens  {chosen:24s} {took * 1e6:8.1f} {moved / BANDWIDTH / took:6.2f} "
            f"{moved / took / 1e12:5.2f}  " + "  ".join(f"{t * 1e6:.1f} {n}" for t, n in times[1:]),
            flush=True,
        )


if __name__ == "__main__":
    bench()
