"""Attention on the present GPU, beside its floors and PyTorch's attention over unpaged copies.

``attention`` times what plans carry, and PyTorch's attention; ``attention_sweep`` more ways to cut the work, for
the cost model. All ways are held to the references first. Caches rotate, so that a small one is not left in L2
when its turn comes again; pages lie in random order. Heads are those of Qwen3-8B unless a line says otherwise. Latent
attention is in :mod:`benchmarks.gpu.attention_mla`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import attention_mla, launcher, rates
from benchmarks.gpu.attention_batches import B16, F8, PAGE, Batch, Tensors, batches, checked, kv_bytes
from benchmarks.gpu.shapes import HEAD_DIM, HEADS, KV_HEADS, copies
from makeready.kernels import registry
from makeready.kernels.attention import decode_triton, extend_cuda, extend_tiling, extend_triton, paged
from makeready.kernels.attention.qkv_triton import norm_rope_kv_write_cuda
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall

assert extend_cuda  # imported, so that it is registered
assert isinstance(paged.decode_attention, Contract)
assert isinstance(paged.extend_attention, Contract)
assert isinstance(paged.norm_rope_kv_write, Contract)

ROTATED = 200e6  # bytes that calls rotate over
QKV_ATTRS = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "eps": 1e-6}

Emit = Callable[[OpCall], Sequence[Candidate]]

TOKENS = (1, 16, 64, 256, 1024, 8192)  # of writing to the cache
PARTS = ("decode", "extend", "write", "latent")


def ways_of(call: OpCall, *, sweep: bool) -> Sequence[Candidate]:
    """The ways to run an attention that plans carry, or more."""
    if call.op == "decode_attention":
        return _decode_ways(call) if sweep else decode_triton.decode_attention_cuda(call)
    prefill = [extend_cuda.candidate(call, schedule) for schedule in extend_cuda.schedules(call)]
    if sweep:
        return [*_extend_ways(call), *prefill]
    ways = [way for kernel in registry.cuda_kernels(call.op) for way in kernel.candidates(call)]
    ways = sorted(ways, key=lambda way: way.seconds)  # the planner's first one first
    return [*ways, *(way for way in prefill if way.name not in {known.name for known in ways})]


def calls(parts: Collection[str], *, sweep: bool) -> Iterator[tuple[OpCall, Sequence[Candidate]]]:
    """What is going to run of these of :data:`PARTS`, without operands."""
    for batch in (*_of(parts, checked()), *_of(parts, batches(sweep=sweep))):
        call = launcher.op_call(batch.contract, batch.operands("meta"), batch.heads.attrs)
        yield call, ways_of(call, sweep=sweep)
    for kind, tokens in _written(parts, sweep=sweep):
        call = launcher.op_call(paged.norm_rope_kv_write, _qkv_operands(tokens, kind, "meta"), QKV_ATTRS)
        yield call, norm_rope_kv_write_cuda(call)
    if "latent" in parts and not sweep:
        yield from attention_mla.calls()


def measure(note: Callable[[str], None], parts: Collection[str], *, sweep: bool) -> list[dict[str, Any]]:
    """Of each batch of these of :data:`PARTS`: bytes, operations, floor, PyTorch's seconds where it has any, and
    those of each way, the planner's first one first. A sweep has no writing and no latents.
    """
    launcher.prepare(calls(parts, sweep=sweep))
    for batch in _of(parts, checked()):
        launcher.check(
            batch.contract,
            lambda call: _fitting(call, sweep=sweep),
            batch.operands("cuda"),
            batch.heads.attrs,
        )
    found = []
    for batch in _of(parts, batches(sweep=sweep)):
        note(batch.label)
        found.append(_time_batch(batch, sweep=sweep))
    found += [_time_qkv(tokens, kind) for kind, tokens in _written(parts, sweep=sweep)]
    if "latent" in parts and not sweep:
        attention_mla.check()
        for latents in attention_mla.batches():
            note(latents.label)
            found.append(attention_mla.measure(latents))
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a batch: the first way's time, its share of the floor, PyTorch's time, that of the best way in Triton,
    the best of all ways and the next three.
    """
    lines = [
        "dtype rows x (queries, context)      chosen                           µs  floor  TB/s TFLOP/s  SDPA µs"
        "       Triton  best µs                              others"
    ]
    for row in found:
        times = row["seconds"]
        chosen = next(iter(times))
        best, *others = sorted(times, key=times.__getitem__)
        took, other = times[chosen], row["sdpa"]
        in_triton = (n for name, n in times.items() if not name.startswith(("wgmma", "keys")))
        triton = min(in_triton, default=float("inf"))
        lines.append(
            f"{row['rows']:36s} {chosen:26s} {took * 1e6:8.1f} {row['floor'] / took:6.2f} "
            f"{row['nbytes'] / took / 1e12:5.2f} {row['operations'] / took / 1e12:7.0f} "
            f"{float('inf') if other is None else other * 1e6:8.1f} {row['backend']:6s}"
            f"{triton * 1e6:8.1f} {times[best] * 1e6:8.1f} {best:26s}"
            + "  ".join(f"{times[name] * 1e6:.1f} {name}" for name in others[:3] if name != chosen)
        )
    return lines


def _of(parts: Collection[str], made: Iterable[Batch]) -> list[Batch]:
    return [batch for batch in made if ("decode" if batch.decode else "extend") in parts]


def _written(parts: Collection[str], *, sweep: bool) -> list[tuple[torch.dtype, int]]:
    """Caches and numbers of tokens that are written to them."""
    return [] if sweep or "write" not in parts else list(itertools.product((B16, F8), TOKENS))


def _qkv_operands(tokens: int, kind: torch.dtype, device: str) -> Tensors:
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    cache = torch.zeros(1 + -(-tokens // PAGE), PAGE, KV_HEADS, HEAD_DIM, device=device).to(kind)
    return {
        "qkv": torch.randn(tokens, width, dtype=torch.bfloat16, device=device),
        "rows": torch.randn(tokens, HEAD_DIM, device=device),
        "q_norm": torch.randn(HEAD_DIM, dtype=torch.bfloat16, device=device),
        "k_norm": torch.randn(HEAD_DIM, dtype=torch.bfloat16, device=device),
        "kv_slot": (PAGE + torch.arange(tokens, dtype=torch.int32)).to(device),
        "k_cache": cache,
        "v_cache": cache.clone(),
    }


def _decode_ways(call: OpCall) -> list[Candidate]:
    """More ways than plans carry."""
    narrow = call.tensors["k_cache"].dtype == "float8_e4m3fn"
    sizes = [(32, 4), (64, 4), (64, 8), (128, 8)]
    made = []
    for (keys, warps), stages, blocks in itertools.product(sizes, (3, 4, 6), (1, 2, 3)):
        held = 2 * keys * call.attrs["head_dim"] * (1 if narrow else 2) * (stages - 1) * blocks
        if held <= call.shared_bytes - 8192 * blocks and warps * blocks <= 16:
            made.append(decode_triton.candidate(call, keys, warps, stages, blocks))
    return made


def _extend_ways(call: OpCall) -> list[Candidate]:
    """More ways than plans carry; registers do not suffice for rounds with tiles of 128 and 4 warps."""
    ways: list[extend_tiling.Tiling] = []
    for way in extend_tiling.tilings(call):
        ways += [way, replace(way, rounds=False), replace(way, rounds=False, stages=way.stages + 1)]
        if way.warps == 8 or way.m == 64:
            ways.append(replace(way, stages=way.stages + 1))
    return [extend_triton.candidate(call, way) for way in dict.fromkeys(ways)]


def _fitting(call: OpCall, *, sweep: bool) -> list[Candidate]:
    return [way for way in ways_of(call, sweep=sweep) if launcher.fits(way, call)]


def _time_batch(batch: Batch, *, sweep: bool) -> dict[str, Any]:
    count = copies(batch.nbytes, over=ROTATED, most=8)
    sets = [batch.operands("cuda") for _ in range(count)]
    call = launcher.op_call(batch.contract, sets[0], batch.heads.attrs)
    other, backend = _sdpa(batch, count) if not sweep and batch.kind == B16 else (None, "")
    return {
        "rows": batch.label,
        "op": batch.contract.name,
        "nbytes": batch.nbytes,
        "operations": batch.operations,
        "floor": batch.floor,
        "sdpa": other,
        "backend": backend,
        "seconds": {way.name: launcher.time(way, call, sets) for way in _fitting(call, sweep=sweep)},
    }


def _time_qkv(tokens: int, kind: torch.dtype) -> dict[str, Any]:
    """The kernel before attention: norms, rotation, and what it writes to the cache."""
    moved = tokens * (2 * (2 * HEADS + 2 * KV_HEADS) + 4) * HEAD_DIM + tokens * kv_bytes(kind)
    sets = [_qkv_operands(tokens, kind, "cuda") for _ in range(copies(moved, over=ROTATED, most=64))]
    call = launcher.op_call(paged.norm_rope_kv_write, sets[0], QKV_ATTRS)
    return {
        "rows": f"{'f8' if kind == F8 else 'bf16'} norm_rope_kv_write {tokens}",
        "op": "norm_rope_kv_write",
        "nbytes": moved,
        "operations": 0.0,
        "floor": rates.present().floor(moved),
        "sdpa": None,
        "backend": "",
        "seconds": {way.name: launcher.time(way, call, sets) for way in norm_rope_kv_write_cuda(call)},
    }


def _sdpa(batch: Batch, count: int) -> tuple[float | None, str]:
    """Least seconds of PyTorch's attention over dense equal rows, and the backend; None where rows differ."""
    rows = [row for row in batch.rows if row != (0, 0)]
    queries, context = rows[0]
    if any(row != rows[0] for row in rows) or queries not in (1, context):
        return None, ""
    shapes: Iterable[tuple[str, int, int]] = (
        ("q", batch.heads.heads, queries),
        ("k", batch.heads.kv_heads, context),
        ("v", batch.heads.kv_heads, context),
    )
    sets = [
        {
            name: torch.randn(len(rows), heads, n, batch.heads.size, dtype=torch.bfloat16, device="cuda")
            for name, heads, n in shapes
        }
        for _ in range(count)
    ]
    found: list[tuple[float, str]] = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                took = launcher.time_each(
                    lambda s: functional.scaled_dot_product_attention(
                        s["q"], s["k"], s["v"], is_causal=queries > 1, enable_gqa=True
                    ),
                    sets,
                )
        except RuntimeError:  # this backend does not take these shapes
            continue
        found.append((took, backend.name.partition("_")[0].lower()))
    return min(found) if found else (None, "")
