"""Latent attention: its two forms are one, references are PyTorch's attention, and deterministic kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from case import Case, Random, int32
from inputs import cases
from mla_inputs import GEOMETRIES, filled_latents
from mla_operands import scaled_latents
from torch.nn import functional

from makeready.graphs.planner.ir import Call
from makeready.kernels import registry
from makeready.kernels.attention.mla_scaled import quantize_latents
from makeready.kernels.contract import ANY, CONTRACTS, INVARIANT
from makeready.kernels.registry import Kernel
from makeready.kernels.rope import rotate

registry.discover()
FORMS = {"merged": ANY, "absorbed": INVARIANT}


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def expanded(case: Case, kind: str) -> torch.Tensor:
    """What the ops that the case becomes in steps of a kind make of it."""
    contract = case.contract
    assert contract.expands
    call = Call(case.op, {name: name for name in case.operands}, {"y": "result"}, case.attrs)
    values: dict[str, Any] = dict(case.operands)
    for made in contract.expands[kind](None, call):  # type: ignore[arg-type]
        names = [o.name for o in made.contract.inputs]
        operands = {o: values[v] for o, v in made.operands.items()}
        results = made.contract.reference(*(operands.get(n) for n in names), **made.attrs)
        results = results if isinstance(results, tuple) else (results,)
        values |= dict(zip(made.results.values(), results, strict=True))
    return values["result"]


@pytest.mark.parametrize("kind", FORMS.values(), ids=FORMS)
def test_every_form_is_attention_with_keys_and_values_of_every_head(kind: str) -> None:
    """In float64, but for the logarithms that parts are merged by, which are float32."""
    tried = 0
    for case in cases("mla_attention"):
        if case.operands["cache"].dtype == case.operands["q"].dtype == torch.float32:
            doubled = case.mapped(wide)
            made, wanted = expanded(doubled, kind), attention_by_hand(doubled)
            torch.testing.assert_close(made, wanted, rtol=0, atol=3e-6, msg=case.label)
            tried += 1
    assert tried > 10


def attention_by_hand(case: Case) -> torch.Tensor:
    """PyTorch's attention of one query after the other; features of a pair are turned as complex numbers."""
    o, a = case.operands, case.attrs
    page, heads, rank, rope = o["cache"].shape[1], a["heads"], a["rank"], a["rope"]
    y = torch.zeros(len(o["q"]), heads * a["value"], dtype=torch.float64)
    kv_b = o["kv_b"].unflatten(0, (heads, -1))
    rows = zip(*(o[name].tolist() for name in ("query_start", "query_len", "context_len")), strict=True)
    for r, (start, count, length) in enumerate(rows):
        for i in range(count):
            where = [(int(o["page_table"][r, k // page]), k % page) for k in range(length - count + i + 1)]
            latents = torch.stack([o["cache"][p, s] for p, s in where])
            kv_HKD = torch.einsum("hdl,kl->hkd", kv_b, latents[:, :rank])
            q_HD = o["q"][start + i].unflatten(0, (heads, -1))
            turned = turn(q_HD[:, a["nope"] :], o["rows"][start + i], interleaved=a["interleaved"])
            q = torch.cat((q_HD[:, : a["nope"]], turned), -1)
            rotated = latents[:, rank:].expand(heads, -1, rope)
            k = torch.cat((kv_HKD[..., : a["nope"]], rotated), -1)
            v = kv_HKD[..., a["nope"] :]
            y[start + i] = functional.scaled_dot_product_attention(
                q[:, None], k, v, scale=a["scale"]
            ).flatten()
    return y


def turn(x: torch.Tensor, row: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Features of every head turned by a token's row, the first of every pair before the second."""
    if not interleaved:
        return rotate(x[None], row[None])[0]
    half = x.shape[-1] // 2
    by = torch.complex(row[:half], row[half:])
    made = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * by
    return torch.cat((made.real, made.imag), -1)


@pytest.mark.parametrize("op", ["mla_extend_attention", "mla_own_attention", "mla_decode_attention"])
def test_nothing_unwritten_leaks(op: str) -> None:
    """Unused pages, page tails and tokens of nobody are NaN; tokens without keys give zeros and -inf."""
    for kernel in registry.kernels(op, "cpu"):
        for case in cases(op):
            made = case.run(kernel.run)
            assert not made["y"].isnan().any(), f"{kernel.name} {case.label}"
            if "log_sum" in made:
                none = made["log_sum"] == float("-inf")
                assert not made["log_sum"].isnan().any(), f"{kernel.name} {case.label}"
                assert not made["y"].unflatten(1, (none.shape[1], -1))[none].any(), case.label


def invariant(op: str) -> Kernel:
    (found,) = [k for k in registry.kernels(op, "cpu") if k.invariant]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8_per_token"])
def test_attention_of_a_token_is_the_same_in_every_step(dtype: str) -> None:
    """In chunks beside another row as at once, to the last bit."""
    form, length = GEOMETRIES[0], 61
    scaled = dtype == "int8_per_token"
    random, kernel = Random(1), invariant(f"mla_extend_attention{'_scaled' if scaled else ''}")
    cache, table, _ = filled_latents(random, form, [length, length], "float32" if scaled else dtype)
    caches = scaled_latents(cache, form.rank, "int8").values() if scaled else [cache]
    q = random.normal(2, length, form.heads * form.width)
    attrs = {**form.attrs("heads", "rank", "rope"), "scale": 0.3, "own": True}

    def step(*chunks: tuple[int, int, int]) -> list[torch.Tensor]:
        counts = [end - begin for _, begin, end in chunks]
        y, log_sum = kernel.run(
            torch.cat([q[s, begin:end] for s, begin, end in chunks]),
            *caches,
            table[[s for s, _, _ in chunks]],
            int32([sum(counts[:r]) for r in range(len(counts))]),
            int32(counts),
            int32([end for _, _, end in chunks]),
            **attrs,
        )
        return list(torch.cat((y, log_sum), 1).split(counts))

    (whole,), (other,) = step((0, 0, length)), step((1, 0, length))
    for begin, end in ((0, 1), (5, 33), (7, 8), (40, 61)):
        alone, beside = step((0, begin, end), (1, 60 - begin, 61))
        assert torch.equal(alone, whole[begin:end])
        assert torch.equal(beside, other[60 - begin :])


@pytest.mark.parametrize("op", ["mla_write", "mla_write_scaled"])
def test_latents_are_the_same_in_every_step(op: str) -> None:
    kernel = invariant(op)
    for case in cases(op):
        o = case.operands
        whole = kernel.run(*o.values(), **case.attrs)
        for t in range(len(o["kv"])):
            part = {k: x[t : t + 1] if k in ("kv", "rows", "kv_slot") else x for k, x in o.items()}
            one = Case(case.op, case.label, part, case.attrs).run(kernel.run)["latent"]
            assert torch.equal(one.nan_to_num(9), whole[t : t + 1].nan_to_num(9)), case.label


def test_every_op_of_latent_attention_is_here() -> None:
    """So that a new one is not forgotten."""
    ops = {name for name in CONTRACTS if name.startswith("mla_")} | {"merge_attention"}
    reached: set[str] = set()
    models = ("mla_attention", "mla_attention_scaled")
    for op in models:
        case = next(cases(op))
        call = Call(case.op, {name: name for name in case.operands}, {"y": "result"}, case.attrs)
        for made in CONTRACTS[op].expands.values():  # type: ignore[union-attr]
            reached |= {one.op for one in made(None, call)}  # type: ignore[arg-type]
    assert ops - reached == {"mla_write", "mla_write_scaled", *models}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_with_a_scale_are_near(dtype: torch.dtype) -> None:
    """By hand: a step is a 127th of the largest value, of e4m3 a sixteenth of the number at most."""
    x = torch.cat((torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * 10, torch.zeros(1, 64)))
    x[7] *= 1e-6
    numbers, scale = quantize_latents(x, dtype)
    largest = x.abs().amax(-1, keepdim=True)
    step = largest / 254 if dtype == torch.int8 else x.abs() / 16 + largest / 448 / 2**9
    assert ((numbers.float() * scale - x).abs() <= step * 1.0001).all()
    bad = x[:3].clone()
    bad[0, 5], bad[1, 0] = torch.nan, -torch.inf
    assert quantize_latents(bad, dtype)[1].isnan().flatten().tolist() == [True, True, False]
