"""Triton kernels of latent attention on the GPU against the references in float64, with NaN in all that is nobody's.

python -m pytest tests/gpu/test_gpu_mla.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu import launcher
from case import in_columns, int32
from mla_operands import (
    V2_LITE,
    V3,
    Sizes,
    Tensors,
    attrs_of,
    merge_operands,
    of_tokens,
    paged_latents,
    query_operands,
    step_rows,
    up_projection,
    write_operands,
)
from prepared import prepare

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall

registry.discover("cuda")

Case = tuple[str, Tensors, dict[str, Any]]
Rows = Sequence[tuple[int, int]]

TINY: Sizes = (1, 16, 8, 16, 32)
ODD: Sizes = (3, 24, 16, 20, 48)
SPLIT_8: Sizes = (16, 128, 64, 128, 512)  # V3 on 8 GPUs
ROWS: Sequence[Rows] = (
    ((1, 1), (64, 64), (1, 1000), (0, 0), (63, 191), (65, 65), (1, 64), (130, 1030), (0, 0)),
    ((5, 6000),),
    ((300, 300),),
    ((1, 3000), (1, 1), (1, 128), (1, 129), (0, 0)),
    ((0, 0), (0, 0)),
)
LENGTHS = ((1, 63, 64, 65, 0, 1000, 127, 128, 129, 15, 16, 17, 0), (9000,), (64,) * 70, (0, 0))


def write_case(sizes: Sizes, tokens: int, page: int, dtype: str, cache: str) -> Case:
    made = write_operands(sizes, tokens, page, dtype, cache)
    return "mla_write", made, attrs_of(sizes, "rank", "rope", eps=1e-6, interleaved=tokens % 2 == 0)


def rope_case(sizes: Sizes, tokens: int, dtype: str) -> Case:
    made = query_operands(sizes, tokens, dtype)
    return "mla_rope", made, attrs_of(sizes, "heads", "nope", "rope", interleaved=tokens % 2 == 0)


def absorb_case(sizes: Sizes, tokens: int, dtype: str) -> Case:
    made = query_operands(sizes, tokens, dtype) | {"kv_b": up_projection(sizes, dtype)}
    attrs = attrs_of(sizes, "heads", "nope", "rope", "value", "rank", interleaved=tokens % 2 == 0)
    return "mla_absorb", made, attrs


def values_case(sizes: Sizes, tokens: int, dtype: str) -> Case:
    x = of_tokens(((tokens, tokens),), sizes[0] * sizes[4], dtype, before=0)[:tokens]
    attrs = attrs_of(sizes, "heads", "nope", "value", "rank")
    return "mla_values", {"x": x, "kv_b": up_projection(sizes, dtype)}, attrs


def decode_case(sizes: Sizes, lengths: Sequence[int], page: int, dtype: str, cache: str) -> Case:
    width = sizes[4] + sizes[2]
    q = of_tokens(((len(lengths), 0),), sizes[0] * width, dtype, before=0)[: len(lengths)]
    q[[n == 0 for n in lengths]] = float("nan")
    made = paged_latents(lengths, page, width, cache)
    made |= {"q": in_columns(q, 8, 8), "context_len": int32(lengths)}
    return "mla_decode_attention", made, attrs_of(sizes, "heads", "rank", "rope", "scale")


def extend_case(sizes: Sizes, rows: Rows, page: int, dtype: str, cache: str, own: bool) -> Case:
    width = sizes[4] + sizes[2]
    made = paged_latents([context for _, context in rows], page, width, cache) | step_rows(rows)
    made["q"] = of_tokens(rows, sizes[0] * width, dtype)
    return "mla_extend_attention", made, attrs_of(sizes, "heads", "rank", "rope", "scale", own=own)


def own_case(sizes: Sizes, rows: Rows, dtype: str) -> Case:
    heads, nope, rope, value, rank = sizes
    made = {
        "q": of_tokens(rows, heads * (nope + rope), dtype),
        "kv": of_tokens(rows, heads * (nope + value), dtype, 1),
        "latent": in_columns(of_tokens(rows, rank + rope, dtype, 2), 8, 8),
    }
    made |= {name: x for name, x in step_rows(rows).items() if name != "context_len"}
    return "mla_own_attention", made, attrs_of(sizes, "heads", "nope", "rope", "value", "rank", "scale")


def merge_case(heads: int, value: int, tokens: int, dtype: str) -> Case:
    return "merge_attention", merge_operands(heads, value, tokens, dtype), {"heads": heads, "value": value}


B16, F16, F8 = "bfloat16", "float16", "float8_e4m3fn"
CASES: dict[str, Callable[[], Case]] = {
    f"{make.__name__}-{sizes}-{tokens}-{dtype}": partial(make, sizes, tokens, dtype)
    for make in (rope_case, absorb_case, values_case)
    for sizes, counts in ((V2_LITE, (1, 64, 700)), (V3, (1, 33)), (ODD, (17,)), (TINY, (1,)))
    for tokens in counts
    for dtype in (B16, F16)
}
CASES |= {
    f"write-{sizes}-{tokens}-{page}-{cache}": partial(write_case, sizes, tokens, page, B16, cache)
    for sizes, tokens, page in ((V2_LITE, 1, 64), (V2_LITE, 900, 64), (ODD, 33, 7), (TINY, 8, 1))
    for cache in (B16, F8)
}
CASES |= {
    f"decode-{sizes}-{page}-{cache}-{len(lengths)}": partial(decode_case, sizes, lengths, page, dtype, cache)
    for dtype, cache in ((B16, B16), (F16, F16), (B16, F8))
    for sizes, page in ((V2_LITE, 64), (V3, 64), (ODD, 7), (TINY, 1))
    for lengths in (LENGTHS if page == 64 else LENGTHS[:1])
}
CASES |= {
    f"extend-{sizes}-{page}-{cache}-{own}-{rows}": partial(extend_case, sizes, rows, page, B16, cache, own)
    for cache in (B16, F8)
    for own in (True, False)
    for sizes, page in ((V2_LITE, 64), (V3, 64), (SPLIT_8, 16), (ODD, 7), (TINY, 1))
    for rows in (ROWS if sizes == V2_LITE and page == 64 else ROWS[:1])
}
CASES |= {
    f"own-{sizes}-{dtype}-{rows}": partial(own_case, sizes, rows, dtype)
    for dtype in (B16, F16)
    for sizes in (V2_LITE, V3, ODD, TINY)
    for rows in (ROWS if sizes == V2_LITE else ROWS[:1])
}
CASES |= {
    f"merge-{heads}-{tokens}-{dtype}": partial(merge_case, heads, value, tokens, dtype)
    for heads, value, tokens in ((16, 128, 1), (128, 128, 300), (3, 20, 7))
    for dtype in (B16, F16)
}


def emit(call: OpCall) -> list[Candidate]:
    """All ways of the Triton kernels that find the resources which they need, of deterministic plans too."""
    calls = (call, replace(call, invariant=True, most_rows=call.rows))
    found = [way for c in calls for kernel in registry.cuda_kernels(call.op) for way in kernel.candidates(c)]
    distinct = {str(way.launches): way for way in found if "triton" in way.launches[0].function}
    return [way for way in distinct.values() if launcher.fits(way, call)]


def operands(name: str) -> Case:
    op, tensors, attrs = CASES[name]()
    # What is columns of something wider stays such.
    placed = {
        k: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
        for k, x in tensors.items()
    }
    return op, placed, attrs


@pytest.fixture(scope="module")
def kernels() -> None:
    """Everything compiled on all cores, which takes minutes one after the other."""
    work = []
    for name in CASES:
        op, tensors, attrs = operands(name)
        call = launcher.op_call(CONTRACTS[op], tensors, attrs)
        ways = [w for k in registry.cuda_kernels(op) for w in k.candidates(call)]
        ways += [w for k in registry.cuda_kernels(op) for w in k.candidates(replace(call, invariant=True))]
        work.append((call, [way for way in ways if "triton" in way.launches[0].function]))
    prepare(work)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("kernels")
def test_against_the_reference(name: str) -> None:
    """Results and what is written, by norm; where a reference is infinite the result is the same."""
    op, tensors, attrs = operands(name)
    contract = CONTRACTS[op]
    call = launcher.op_call(contract, tensors, attrs)
    wide = {k: v.cpu().double() if v.is_floating_point() else v.cpu() for k, v in tensors.items()}
    made = contract.reference(*(wide[o.name] for o in contract.inputs), **call.attrs)
    made = made if isinstance(made, tuple) else (made,)
    wanted = dict(zip((o.name for o in contract.outputs), made, strict=True))
    wanted |= {n: wide[n] for n in contract.writes}
    ways = emit(call)
    assert ways
    for way in ways:
        first, second = (
            launcher.run(way, call, {k: v.clone() if k in contract.writes else v for k, v in tensors.items()})
            for _ in range(2)
        )
        for result, want in wanted.items():
            where = f"{op}/{way.name}: {result}"
            got = first[result].cpu()
            assert torch.equal(
                first[result].contiguous().view(torch.uint8), second[result].contiguous().view(torch.uint8)
            ), f"{where} differs between two runs"
            number = want.isfinite()
            assert torch.equal(got.double().isfinite(), number), f"{where} has NaN or infinity"
            assert torch.equal(got.double()[want.isinf()], want[want.isinf()]), where
            error = (got.double() - want)[number].norm() / want[number].norm().clamp_min(1e-30)
            allowed = getattr(contract.tolerance, str(got.dtype).removeprefix("torch."))
            if result == "log_sum":  # of scores that came from 16 bits
                allowed = contract.tolerance.bfloat16
            assert error <= allowed, f"{where} is off by {error:.1e}"


@pytest.mark.usefixtures("kernels")
def test_a_token_gets_the_same_bits_in_every_step() -> None:
    """Of deterministic plans: absorbed attention of chunks, and of single tokens beside others."""
    length = 700
    op, tensors, attrs = extend_case(V2_LITE, ((length, length),), 64, B16, B16, True)
    q = tensors["q"][2 : 2 + length]
    chunks = ((0, 1), (0, 300), (300, 301), (301, 699), (699, 700))
    rows = [(end - begin, end) for begin, end in chunks]
    apart = step_rows(rows, before=0) | {
        "q": torch.cat([q[begin:end] for begin, end in chunks]),
        "cache": tensors["cache"],
        "page_table": tensors["page_table"].expand(len(rows), -1).contiguous(),
    }
    whole = tensors | step_rows(((length, length),), before=0) | {"q": q.contiguous()}
    results = []
    for given in (whole, apart):
        placed = {k: x.cuda() for k, x in given.items()}
        call = replace(launcher.op_call(CONTRACTS[op], placed, attrs), invariant=True, most_rows=len(rows))
        ways = {w.name: w for k in registry.cuda_kernels(op) for w in k.candidates(call)}
        results.append({n: launcher.run(w, call, placed) for n, w in ways.items() if launcher.fits(w, call)})
    assert results[0]
    for name, made in results[0].items():
        for result in ("y", "log_sum"):
            parts = results[1][name][result].split([count for count, _ in rows])
            for (begin, end), part in zip(chunks, parts, strict=True):
                assert torch.equal(part, made[result][begin:end]), f"{name}: tokens {begin} to {end}"
