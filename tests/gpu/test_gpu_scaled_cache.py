"""Attention over caches with scales, and what writes them, on the GPU against the references.

The cases are those of the interpreter (tests/kernels/test_scaled_triton.py) in bf16, and longer ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from attention_interpreted import verify_step
from benchmarks.gpu import launcher
from case import Case, Random
from mla_operands import (
    V2_LITE,
    V3,
    Sizes,
    attrs_of,
    of_tokens,
    paged_latents,
    scaled_latents,
    step_rows,
    write_operands,
)
from prepared import prepare
from scaled_inputs import FORMATS, empty_caches
from test_gpu_attention import fitting
from test_scaled_triton import DECODE, EXTEND, VERIFY, extend_step, paged

from makeready.kernels.attention.decode_triton import decode_attention_cuda
from makeready.kernels.attention.extend_triton import extend_attention_cuda
from makeready.kernels.attention.formats import CacheFormat
from makeready.kernels.attention.mla_attention_triton import (
    mla_decode_attention_cuda,
    mla_extend_attention_cuda,
)
from makeready.kernels.attention.mla_write_triton import mla_write_cuda
from makeready.kernels.attention.qkv_triton import norm_rope_kv_write_cuda
from makeready.kernels.attention.scaled import (
    decode_attention_scaled,
    extend_attention_scaled,
    kv_write_scaled,
    norm_rope_kv_write_scaled,
    verify_attention_scaled,
    widen_heads,
)
from makeready.kernels.attention.write_scaled_triton import kv_write_scaled_cuda
from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.registry import Emit

assert isinstance(decode_attention_scaled, Contract)
assert isinstance(extend_attention_scaled, Contract)
assert isinstance(kv_write_scaled, Contract)
assert isinstance(norm_rope_kv_write_scaled, Contract)
assert isinstance(verify_attention_scaled, Contract)

Call = tuple[Contract, Emit, dict[str, torch.Tensor], dict[str, Any]]
QWEN3_8B = (32, 8, 128, 64, 0)
LONG = ((5, 3000), (300, 300), (1, 7), (33, 1500))


def _on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries and what is projected in bf16; scales stay fp16."""
    wide = {
        k: x.bfloat16() if k in ("q", "k", "v", "qkv", "q_norm", "k_norm") else x for k, x in tensors.items()
    }
    return {k: x.cuda() for k, x in wide.items()}


def _attention(geometry: Any, rows: Any, kind: CacheFormat) -> Call:
    heads, kv_heads, size, _, window = geometry
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": size, "scale": size**-0.5, "window": window}
    attrs |= {"bits": kind.bits}
    if isinstance(rows, dict):  # tokens that rows have room for, and rows
        ((each, rows),) = rows.items()
        made = verify_step(paged(tuple(n for _, n in rows), geometry, kind), heads, size, each, rows)
        return verify_attention_scaled, fitting, _on_gpu(made), attrs
    if isinstance(rows[0], tuple):
        made = extend_step(geometry, rows, kind)
        return extend_attention_scaled, extend_attention_cuda, _on_gpu(made), attrs
    made = paged(rows, geometry, kind) | {"q": torch.randn(len(rows), heads * size)}
    return decode_attention_scaled, decode_attention_cuda, _on_gpu(made), attrs


def _write(fused: bool, size: int, tokens: int, kind: CacheFormat) -> Call:
    random = Random(tokens)
    kv_heads, heads = 8, 32
    made = empty_caches(torch.zeros(20, 64, kv_heads, size), kind)
    made["kv_slot"] = random.permutation(20 * 64)[:tokens].int()
    attrs: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": size, "bits": kind.bits}
    if not fused:
        made |= {name: random.normal(tokens, kv_heads * size) for name in "kv"}
        return kv_write_scaled, kv_write_scaled_cuda, _on_gpu(made), attrs
    made |= {"qkv": random.normal(tokens, (heads + 2 * kv_heads) * size), "rows": random.rotary(tokens, size)}
    made |= {name: random.uniform(size) for name in ("q_norm", "k_norm")}
    return (
        norm_rope_kv_write_scaled,
        norm_rope_kv_write_cuda,
        _on_gpu(made),
        attrs | {"heads": heads, "eps": 1e-6},
    )


CASES = {
    f"{kind.dtype}-{geometry}-{rows}": (geometry, rows, kind)
    for kind in FORMATS
    for geometry, rows in (
        *DECODE,
        *EXTEND,
        *((where, {each: rows}) for where, each, rows in VERIFY),
        (QWEN3_8B, {5: ((5, 1000),)}),
        (QWEN3_8B, {5: ((5, 3000), (1, 1), (0, 0), (4, 64))}),
        (QWEN3_8B, (3000, 1, 64)),
        (QWEN3_8B, LONG),
        (QWEN3_8B, (64,) * 70),
    )
}
WRITES = {
    f"{kind.dtype}-{fused}-{size}-{tokens}": (fused, size, tokens, kind)
    for kind in FORMATS
    for fused in (False, True)
    for size, tokens in ((128, 1), (128, 777), (64, 30), (256, 5))
}


def _first(emit: Emit) -> Emit:
    return lambda call: emit(call)[:1]


@pytest.fixture(scope="module")
def kernels() -> None:
    """Everything compiled on all cores."""
    made = [_attention(*case) for case in CASES.values()] + [_write(*case) for case in WRITES.values()]
    work = []
    for contract, emit, tensors, attrs in made:
        call = launcher.op_call(contract, tensors, attrs)
        work.append((call, _first(emit)(call)))
    prepare(work)


def _latents(op: str, sizes: Sizes, rows: Sequence[tuple[int, int]], dtype: str) -> Call:
    """Of a cache of latents; ``rows`` are (queries, context), of which decoding takes the context."""
    heads, _, rope, _, rank = sizes
    contract = CONTRACTS[f"mla_{op}_scaled"]
    if op == "write":
        made = write_operands(sizes, rows[0][0], 64, "bfloat16", "bfloat16")
        attrs = attrs_of(sizes, "rank", "rope", eps=1e-6, interleaved=True)
        made |= scaled_latents(made["cache"], rank, dtype)
        return contract, mla_write_cuda, {k: x.cuda() for k, x in made.items()}, attrs
    lengths = [context for _, context in rows]
    made = paged_latents(lengths, 64, rank + rope, "bfloat16")
    made |= scaled_latents(made["cache"], rank, dtype)
    attrs = attrs_of(sizes, "heads", "rank", "rope", "scale")
    if op == "decode_attention":
        q = of_tokens([(len(rows), 0)], heads * (rank + rope), "bfloat16", before=0)[: len(rows)]
        made |= {"q": q, "context_len": torch.tensor(lengths, dtype=torch.int32)}
        return contract, mla_decode_attention_cuda, {k: x.cuda() for k, x in made.items()}, attrs
    made |= step_rows(rows) | {"q": of_tokens(rows, heads * (rank + rope), "bfloat16")}
    emit = mla_extend_attention_cuda
    return contract, emit, {k: x.cuda() for k, x in made.items()}, attrs | {"own": False}


LATENTS = {
    f"{op}-{sizes}-{rows}-{dtype}": (op, sizes, rows, dtype)
    for op in ("write", "decode_attention", "extend_attention")
    for sizes in ((3, 24, 16, 20, 48), V2_LITE, V3)
    for rows in (((1, 1), (3, 90), (1, 64)), ((300, 3000), (1, 7), (33, 1500)))
    for dtype in ("int8", "float8_e4m3fn")
}


@pytest.mark.parametrize("name", LATENTS)
def test_latents(name: str) -> None:
    """Attention within its tolerance; written scales within a rounding of what they are of, numbers a step."""
    contract, emit, tensors, attrs = _latents(*LATENTS[name])
    if "write" not in contract.name:
        # Sums of scores that come from 16 bits, as those of latents without scales.
        launcher.check(
            contract, _first(emit), tensors, attrs, allowed={"log_sum": contract.tolerance.bfloat16}
        )
        return
    (way,) = _first(emit)(call := launcher.op_call(contract, tensors, attrs))
    want = Case(contract.name, name, {k: x.cpu() for k, x in tensors.items()}, attrs).run()
    got = {k: x.cpu() for k, x in launcher.run(way, call, tensors).items()}
    x, y = (o["cache"].float() * o["scales"] for o in (got, want))
    assert torch.equal(x.isnan(), y.isnan())
    for mine, other in ((x, y), *((got[n].float(), want[n].float()) for n in ("rope_cache", "latent"))):
        assert (mine - other).nan_to_num(0.0).norm() <= 3e-2 * other.nan_to_num(0.0).norm()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("kernels")
def test_attention(name: str) -> None:
    contract, emit, tensors, attrs = _attention(*CASES[name])
    launcher.check(contract, _first(emit), tensors, attrs)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.usefixtures("kernels")
def test_writes(name: str) -> None:
    """Without norm and rotation bit by bit; behind them a tenth of the numbers may be a step away."""
    contract, emit, tensors, attrs = _write(*WRITES[name])
    call = launcher.op_call(contract, tensors, attrs)
    (way,) = _first(emit)(call)
    want = Case(
        contract.name, name, {k: x.cpu() for k, x in tensors.items()}, {**contract.attrs, **attrs}
    ).run()
    got = {k: x.cpu() for k, x in launcher.run(way, call, tensors).items()}
    half = want["scales"].shape[-1] // 2
    allowed = 3e-2 if attrs["bits"] == 8 else 0.15  # a step of 4 bits is about a third of a deviation
    if "q" not in want:
        for cache in contract.writes:
            assert torch.equal(got[cache].view(torch.uint8), want[cache].view(torch.uint8)), cache
    for at, cache in enumerate(("k_cache", "v_cache")):
        mine = slice(at * half, (at + 1) * half)
        x, y = (widen_heads(o[cache], o["scales"][..., mine], torch.float32) for o in (got, want))
        assert torch.equal(x.isnan(), y.isnan()), cache
        assert (x - y).nan_to_num(0.0).norm() <= allowed * y.nan_to_num(0.0).norm(), cache
