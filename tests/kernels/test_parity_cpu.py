"""Every CPU implementation against its reference computed in float64, at awkward shapes.

Each is run as a function and as a bound call, the latter with the compiled library and without it.

The references of attention are themselves held to PyTorch's attention with explicit masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from case import Case, copy, in_columns
from inputs import cases
from torch.nn import functional

from makeready.graphs.executable.cpu.weights import LAYOUTS
from makeready.kernels import native, registry
from makeready.kernels.contract import CONTRACTS, Tolerance
from makeready.kernels.gemm import linear_cpu
from makeready.kernels.registry import REFERENCE, Kernel

registry.discover()
# An exact op's reference is the specification bit for bit: there is nothing to hold it to here. Chains stand beside
# a GPU's programs alone; their references are those of their ops, with what is rounded between them.
IMPLEMENTATIONS = [
    k
    for op in sorted(op for op in CONTRACTS if not CONTRACTS[op].chains)
    for k in registry.kernels(op, "cpu")
    if not (k.name == REFERENCE and CONTRACTS[op].tolerance.exact)
]
ATTENTION = tuple(
    f"{kind}_attention{scaled}" for kind in ("decode", "extend", "verify") for scaled in ("", "_scaled")
)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def applicable(kernel: Kernel) -> Iterator[tuple[Case, Case]]:
    """Cases that the kernel handles: as they are, and with parameters stored as the kernel wants them."""
    for case in cases(kernel.op):
        if kernel.applies(case.specs(), case.attrs):
            stored = {k: LAYOUTS[kernel.layouts.get(k, "rows")](x) for k, x in case.operands.items()}
            yield case, replace(case, operands=stored)


def compare(made: torch.Tensor, wanted: torch.Tensor, tolerance: Tolerance, label: str) -> None:
    """NaN in the same places, and the rest within the contract's tolerance."""
    assert made.shape == wanted.shape, label
    if made.dtype == torch.uint8 and tolerance.uint8:
        mine, other = (torch.stack((x & 15, x >> 4)).float() for x in (made, wanted))
        compare(mine, other, Tolerance(tolerance.uint8), label)
        return
    inexact = made.is_floating_point() or made.dtype == torch.int8  # which is a number with a scale
    if tolerance.exact or not inexact:
        torch.testing.assert_close(made, wanted.to(made.dtype), rtol=0, atol=0, equal_nan=True, msg=label)
        return
    assert torch.equal(made.isnan(), wanted.isnan()), f"{label}: NaN in other places"
    allowed = getattr(tolerance, str(made.dtype).removeprefix("torch."))
    difference = (made.double() - wanted.double()).nan_to_num(0.0, float("inf"), float("inf")).norm()
    # What is infinite in both differs by nothing, and must not hide other differences.
    error = difference / wanted.double().nan_to_num(0.0, 0.0, 0.0).norm().clamp_min(1e-30)
    assert error <= allowed, f"{label}: {error:.2e} > {allowed}"


def as_function(kernel: Kernel, case: Case) -> dict[str, torch.Tensor]:
    return case.run(kernel.run)


def as_bound_call(kernel: Kernel, case: Case) -> dict[str, torch.Tensor]:
    """Results of a bound call made twice, in columns of poisoned buffers whose other columns must stay."""
    specs = {k: x for k, x in case.operands.items() if isinstance(x, torch.Tensor)}
    operands = {k: copy(x) for k, x in case.operands.items()}
    results = {name: poisoned(x) for name, x in case.run(kernel.run).items() if name not in specs}
    arguments = [operands.get(o.name) for o in case.contract.inputs]
    call = kernel.bound(arguments, [results[o.name] for o in case.contract.outputs], case.attrs)
    for _ in range(2):
        for name in case.contract.writes:
            operands[name].copy_(case.operands[name])
        call()
    for name, x in results.items():
        if x.dim() == 2 and x.is_floating_point():
            wide = x._base
            assert wide is not None
            assert int(wide.isnan().sum() - x.isnan().sum()) == wide.numel() - x.numel(), f"beside {name}"
    return results | {name: operands[name] for name in case.contract.writes}


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """A result's place as lowering may lay it: columns of a wider buffer."""
    if not like.is_floating_point():
        return torch.full_like(like, min(0x7FFF, torch.iinfo(like.dtype).max))
    bad = torch.full(like.shape, float("nan"), dtype=like.dtype)
    return in_columns(bad) if like.dim() == 2 else bad


WAYS = {"function": as_function, "bound": as_bound_call, "bound-without-library": as_bound_call}


@pytest.fixture(params=WAYS)
def run(request, monkeypatch):
    if request.param == "bound" and not native.available():
        pytest.skip("the library was not compiled")
    if request.param == "bound-without-library":
        kernel = request.node.callspec.params.get("kernel")
        if kernel is not None and kernel.name in (registry.REFERENCE, registry.BY_ROWS):
            pytest.skip("references do not use the library")
        monkeypatch.setattr(native, "_library", lambda: None)
    return WAYS[request.param]


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS, ids=lambda k: f"{k.op}-{k.name}")
def test_implementation_agrees_with_the_reference_in_float64(kernel, run):
    tried = 0
    for case, stored in applicable(kernel):
        made = run(kernel, stored)
        tolerance = case.contract.tolerance
        wanted = (case if tolerance.exact else case.widened()).run()
        inferred = case.contract.infer(case.specs(), case.attrs)
        for name, result in made.items():
            dtype = inferred[name].dtype if name in inferred else case.specs()[name].dtype
            assert str(result.dtype) == f"torch.{dtype}", f"{name} of {case.label}"
            compare(result, wanted[name], tolerance, f"{name} of {case.label}")
        tried += 1
    assert tried >= 2, "no case fits the kernel; give its op's builder one that does"


def test_tolerances_are_checked():
    x, off = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.001])
    with pytest.raises(AssertionError, match=r"5\.00e-04"):
        compare(off, x, Tolerance(), "x")
    with pytest.raises(AssertionError, match="NaN"):
        compare(torch.tensor([1.0, float("nan")]), torch.ones(2), Tolerance(), "x")
    with pytest.raises(AssertionError, match="exactly"):
        compare(off, x, Tolerance(exact=True), "exactly")


@pytest.mark.parametrize("op", ATTENTION)
def test_nothing_unwritten_leaks_into_attention(op, run):
    """Unused pages, page tails and queries of nobody are NaN; padding rows and tokens give zeros."""
    for kernel in registry.kernels(op, "cpu"):
        for case, stored in applicable(kernel):
            y = run(kernel, stored)["y"]
            assert not y.isnan().any(), f"{kernel.name} {case.label}"
            owned = set(owners(case))
            for token in range(len(y)):
                assert token in owned or not y[token].any(), f"{kernel.name} {case.label}: token {token}"


def owners(case: Case) -> dict[int, tuple[int, int]]:
    """Token of the batch → its row and its position."""
    o = case.operands
    lengths = o["context_len"].tolist()
    counts = o["query_len"].tolist() if "query_len" in o else [int(n > 0) for n in lengths]
    starts = o["query_start"].tolist() if "query_start" in o else range(len(lengths))
    return {
        start + i: (r, length - count + i)
        for r, (start, count, length) in enumerate(zip(starts, counts, lengths, strict=True))
        for i in range(count)
    }


def number(o: dict[str, torch.Tensor], which: str, page: int, slot: int) -> torch.Tensor:
    """A token's keys or values ``[G, D]`` in float64."""
    x = o[f"{which}_cache"][page, slot]
    if "scales" not in o:
        return x.double()
    scales = o["scales"][page, slot].double()
    at = scales.shape[-1] // 2 * (which == "v")
    scale = scales[:, at, None]
    if x.dtype != torch.uint8:
        return x.double() * scale
    y = torch.zeros(len(x), 2 * x.shape[1], dtype=torch.float64)
    for i, byte in enumerate(x.unbind(1)):
        y[:, 2 * i], y[:, 2 * i + 1] = byte % 16, byte // 16
    return (y - 8) * scale + scales[:, at + 1, None]


def attention_by_hand(case: Case) -> torch.Tensor:
    """PyTorch's attention in float64, one query at a time, over keys looked up one by one."""
    o, a = case.operands, case.attrs
    page = o["k_cache"].shape[1]
    q = o["q"].double().view(len(o["q"]), a["heads"], a["head_dim"])
    y = torch.zeros_like(q)
    for token, (row, position) in owners(case).items():
        oldest = max(0, position - a["window"] + 1) if a["window"] else 0
        where = [(int(o["page_table"][row, i // page]), i % page) for i in range(oldest, position + 1)]
        k, v = (torch.stack([number(o, c, p, s) for p, s in where]).transpose(0, 1) for c in ("k", "v"))
        group = a["heads"] // a["kv_heads"]
        k, v = (torch.stack([x[h // group] for h in range(a["heads"])]) for x in (k, v))
        bias = torch.zeros(a["heads"], 1, k.shape[1], dtype=torch.float64)
        if "sinks" in o:  # the score of one more key, whose value is zero
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            bias = torch.cat((bias, o["sinks"].double()[:, None, None]), -1)
        y[token] = functional.scaled_dot_product_attention(q[token][:, None], k, v, bias, scale=a["scale"])[
            :, 0
        ]
    return y.flatten(1)


@pytest.mark.parametrize("op", ATTENTION)
def test_attention_references_are_attention(op):
    for case in cases(op):
        if case.operands["q"].dtype == torch.float32:
            made = case.mapped(wide).run()["y"]
            torch.testing.assert_close(made, attention_by_hand(case), rtol=1e-10, atol=1e-12, msg=case.label)


@pytest.mark.parametrize("scaled", ["", "_scaled"])
def test_a_decode_step_is_the_last_token_of_an_extend_step(scaled):
    for case in cases(f"decode_attention{scaled}"):
        lengths = case.operands["context_len"]
        rows = {
            "query_start": torch.arange(len(lengths), dtype=torch.int32),
            "query_len": (lengths > 0).int(),
        }
        extend = Case(f"extend_attention{scaled}", case.label, case.operands | rows, case.attrs)
        assert torch.equal(extend.run()["y"], case.run()["y"])


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(k, marks=pytest.mark.slow if k.name == registry.BY_ROWS else ())
        for k in IMPLEMENTATIONS
        if CONTRACTS[k.op].rowwise
    ],
    ids=lambda k: f"{k.op}-{k.name}",
)
def test_a_row_of_nan_stays_alone(kernel, run):
    """What padding rows hold reaches no other row."""
    for case, stored in applicable(kernel):
        by_row = {o.name for o in case.contract.inputs if o.axes[0] == case.contract.rowwise}
        floats = [n for n in by_row & set(case.operands) if case.operands[n].is_floating_point()]
        rows = len(case.operands[min(by_row & set(case.operands))])
        if not floats or rows < 2:
            continue
        whole = run(kernel, stored)
        for name in floats:
            stored.operands[name] = stored.operands[name].clone()
            stored.operands[name][-1] = float("nan")
        for name, made in run(kernel, stored).items():
            compare(made[:-1], whole[name][:-1], Tolerance(), f"{name} of {case.label}")


@pytest.mark.parametrize("largest", [65504.0, 65505.0, 70000.0, 1e20, 3e38])
def test_weights_beyond_fp16_are_multiplied_as_they_are(largest):
    """bf16's range in fp16 panels: held to the same sums in float64, scaled by the row's largest weight."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 33, generator=random)
    weight[7] *= largest / 4
    weight[7, 3], weight[21, 0] = largest, -largest
    weight, x = weight.bfloat16(), torch.rand(5, 33, generator=random) / 33
    packed = LAYOUTS["fbgemm_fp16"](weight)
    if isinstance(packed, torch.Tensor):
        pytest.skip("PyTorch was built without FBGEMM")
    y = torch.zeros(5, 60)
    packed.multiply_into(x, y[:, 4:44])
    wanted = x.double() @ weight.double().T
    near = weight.double().abs().amax(1) * 1e-6
    for made in (y[:, 4:44], packed.multiply(x)):
        assert made.isfinite().all()
        assert ((made - wanted).abs() <= near).all()
    assert not y[:, :4].any()
    assert not y[:, 44:].any()


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused(number):
    if not linear_cpu.packs():
        pytest.skip("PyTorch was built without FBGEMM")
    with pytest.raises(linear_cpu.ProductError, match="NaN or an infinite"):
        LAYOUTS["fbgemm_fp16"](torch.tensor([[1.0, float(number)]]))


def test_weights_packed_in_several_ranges_are_one(monkeypatch):
    if not linear_cpu.packs():
        pytest.skip("PyTorch was built without FBGEMM")
    weight = torch.randn(75, 33, generator=torch.Generator().manual_seed(4)).half()
    weight[40] = 60000.0
    monkeypatch.setattr(linear_cpu, "part_rows", lambda inputs: 32)
    for w in (weight, torch.where(weight == 60000, 120000.0, weight.float()).bfloat16()):
        packed = linear_cpu.pack(w)
        assert [(start, stop) for start, stop, _ in packed.parts] == [(0, 32), (32, 64), (64, 75)]
        assert torch.equal(packed.multiply(torch.eye(33)), w.float().T)


def test_the_library_rounds_to_fp16_as_pytorch_does():
    """So weights that a file holds in fp32 may go to it directly."""
    random = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=random).int().view(torch.float32)
    near = torch.randn(2**14, generator=random) * 1e-5  # subnormal in fp16
    wide = torch.cat([torch.tensor([x for x in EDGES if x < 65505]), near, bits[bits.abs() <= 65504]])
    wide = wide[: len(wide) // 16 * 16].view(-1, 16)
    packed = LAYOUTS["fbgemm_fp16"](wide)
    if isinstance(packed, torch.Tensor):
        pytest.skip("PyTorch was built without FBGEMM")
    assert torch.equal(packed.multiply(torch.eye(16)), wide.half().float().T)


# fp16's ties, subnormals, smallest and largest numbers, what lies beyond them, and fp8's largest.
EDGES = [0.0, 2.0**-25, 2.0**-24 * 1.5, 2.0**-24 * 2.5, 6.09e-5, 464.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
EDGES += [65504.0, 65519.0, 65520.0, 1e30, 1e-30, 3.4e38, float("inf"), float("nan")]


CACHED = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", CACHED, ids=str)
def test_values_are_cached_and_read_as_pytorch_rounds_them(dtype, run):
    """The write rounds like ``Tensor.to``; attention to a single token gives its value back exactly."""
    values = torch.tensor(EDGES + [-x for x in EDGES])
    held = values.clamp(-448, 448) if dtype == torch.float8_e4m3fn else values
    held = held.to(dtype).float()
    cache = torch.zeros(2, 1, 1, 32, dtype=dtype)
    attrs = {"heads": 1, "kv_heads": 1, "head_dim": 32}
    operands = {"qkv": torch.cat((torch.ones(64), values))[None], "rows": torch.ones(1, 32)}
    operands |= {"kv_slot": torch.tensor([1], dtype=torch.int32), "k_cache": cache, "v_cache": cache.clone()}
    write = Case("norm_rope_kv_write", "edges", operands, attrs | {"eps": 0.0})
    made = run(registry.find("norm_rope_kv_write", "fused", "cpu"), write)
    torch.testing.assert_close(made["v_cache"][1, 0, 0].float(), held, rtol=0, atol=0, equal_nan=True)

    one = torch.ones(1, 1, dtype=torch.int32)
    operands = {"q": torch.ones(1, 32), "k_cache": torch.ones_like(cache), "v_cache": made["v_cache"]}
    operands |= {"page_table": one, "context_len": one[0]}
    read = Case("decode_attention", "edges", operands, attrs | {"scale": 1.0, "window": 0})
    y = run(registry.find("decode_attention", "batched", "cpu"), read)["y"][0]
    torch.testing.assert_close(y, held, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not native.available(), reason="the library was not compiled")
def test_silu_of_every_magnitude_is_within_ulps():
    """The library's own exponential, from where silu is zero to where it is the identity."""
    gate = torch.cat((torch.linspace(-86, 88, 200_001), torch.tensor([-1e4, 1e4, float("nan")])))[None]
    case = Case("silu_mul", "magnitudes", {"gate_up": torch.cat((gate, torch.ones_like(gate)), dim=1)})
    y = as_bound_call(registry.find("silu_mul", "fused", "cpu"), case)["y"]
    wanted = functional.silu(gate.double())
    assert torch.equal(y.isnan(), gate.isnan())
    error = ((y - wanted).abs() / wanted.abs().clamp_min(1e-30)).nan_to_num(0.0).max()
    assert error < 4 * 2**-24
