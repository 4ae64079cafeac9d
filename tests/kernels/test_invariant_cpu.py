"""Kernels of deterministic plans on the CPU: a row gets the same bits however many others there are, and wherever
it stands. With the compiled library and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from case import Case, in_columns, int32, spec_of
from inputs import cases

from makeready.graphs.executable.cpu.weights import LAYOUTS
from makeready.kernels import native, registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm import linear_cpu
from makeready.kernels.registry import BY_ROWS, Kernel
from makeready.kernels.spec import TensorSpec

registry.discover()
ROWS = 43  # up to 40 of them at once, from any of the first four on
INVARIANT = {op: [k for k in registry.kernels(op, "cpu") if k.invariant] for op in sorted(CONTRACTS)}
ROW_WISE = [k for op, found in INVARIANT.items() if CONTRACTS[op].rowwise for k in found]


@pytest.fixture(params=["compiled", "pytorch"], autouse=True)
def library(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("the library was not compiled")
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # which cut work anywhere
    yield request.param
    torch.set_num_threads(before)


def results_of(
    kernel: Kernel, operands: Mapping[str, Any], attrs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """What a bound call leaves, written columns beside others' as lowering places views."""
    contract = CONTRACTS[kernel.op]
    given = {o.name: operands[o.name] for o in contract.inputs if o.name in operands}
    specs = {k: spec_of(x) if isinstance(x, torch.Tensor) else operands["packed"] for k, x in given.items()}
    made = {}
    for name, result in contract.infer(specs, attrs).items():
        plain = torch.zeros(result.at({}), dtype=getattr(torch, result.dtype))
        made[name] = in_columns(plain) if plain.dim() == 2 and plain.is_floating_point() else plain
    arguments = [operands.get(o.name) for o in contract.inputs]
    kernel.bound(arguments, [made[o.name] for o in contract.outputs], attrs)()
    return made


def many_rows(case: Case) -> Case:
    """The case with :data:`ROWS` rows like its own, as columns of a buffer of odd width where they are floats."""
    random = torch.Generator().manual_seed(len(case.label))
    operands = dict(case.operands)
    for operand in case.contract.inputs:
        x = case.operands.get(operand.name)
        if x is None or operand.axes[0] != case.contract.rowwise:
            continue
        chosen = x[torch.randint(len(x), (ROWS,), generator=random)]
        if x.dtype == torch.float8_e4m3fn:
            chosen = (torch.randn(chosen.shape, generator=random) * 3).to(x.dtype)
        elif x.is_floating_point():
            chosen = (torch.randn(chosen.shape, generator=random) * 3).abs().add(1e-3).to(x.dtype)
            chosen *= (
                torch.randint(2, chosen.shape, generator=random) * 2 - 1 if operand.name != "x_scale" else 1
            )
            chosen = in_columns(chosen) if chosen.dim() == 2 and operand.name != "x_scale" else chosen
        operands[operand.name] = chosen
    return Case(case.op, case.label, operands, case.attrs)


def applicable(kernel: Kernel) -> Iterator[tuple[Case, dict[str, Any]]]:
    """A few cases that the kernel takes, with parameters stored as it wants them."""
    seen = set()
    for case in cases(kernel.op):
        rows = {o.name for o in case.contract.inputs if o.axes[0] == case.contract.rowwise}
        shapes = tuple((k, x.shape[1:] if k in rows else x.shape, x.dtype) for k, x in case.operands.items())
        if shapes in seen or not kernel.applies(case.specs(), case.attrs) or len(seen) >= 8:
            continue
        if sum(x.numel() for x in case.operands.values()) > 1e6:
            continue
        seen.add(shapes)
        large = many_rows(case)
        stored = {k: LAYOUTS[kernel.layouts.get(k, "rows")](x) for k, x in large.operands.items()}
        for operand in kernel.layouts:
            stored["packed"] = spec_of(case.operands[operand])
        yield large, stored


@pytest.mark.parametrize("kernel", ROW_WISE, ids=lambda k: f"{k.op}-{k.name}")
def test_a_row_has_the_same_bits_in_every_batch_and_place(kernel, library):
    if kernel.name == BY_ROWS and library == "pytorch":
        pytest.skip("has no compiled form")
    tried = 0
    for case, stored in applicable(kernel):
        sliced = [o.name for o in case.contract.inputs if o.axes[0] == case.contract.rowwise]
        sliced = [name for name in sliced if name in stored]
        whole = results_of(kernel, stored, case.attrs)
        for rows in (1, 2, 7, 40) if kernel.name == BY_ROWS else range(1, 41):
            first = (7 * rows) % 4
            part = {k: x[first : first + rows] if k in sliced else x for k, x in stored.items()}
            for name, made in results_of(kernel, part, case.attrs).items():
                wanted = whole[name][first : first + rows]
                same = made.view(torch.uint8) if made.dtype == torch.float8_e4m3fn else made
                other = wanted.view(torch.uint8) if made.dtype == torch.float8_e4m3fn else wanted
                assert torch.equal(same, other), f"{name} of {case.label}: rows {first} to {first + rows}"
        tried += 1
    assert tried >= 1, "no case fits the kernel; give its op's builder one that does"


def test_every_op_of_a_decoder_has_an_invariant_kernel():
    elsewhere = {op for op in INVARIANT if CONTRACTS[op].expands or CONTRACTS[op].chains}
    without = {op for op, found in INVARIANT.items() if not found} - elsewhere
    # All steps of a deterministic plan run extend attention, which has all keys of latents in the cache; it has no
    # trees of drafts. Weights are quantized and made wide when they are loaded.
    steps = {f"{kind}_attention{scaled}" for kind in ("decode", "verify") for scaled in ("", "_scaled")} | {
        "tree_attention"
    }
    latent = {"mla_decode_attention", "mla_decode_attention_scaled", "mla_own_attention"}
    loading = {"quantize_fp8_block", "dequantize_fp8", "dequantize_fp8_block", "dequantize_int"}
    loading |= {"dequantize_int8", "dequantize_mx"}
    assert without <= {*steps, *loading, *latent}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("window", [0, 37])
def test_attention_of_a_token_is_the_same_in_every_step(dtype, window):
    """A sequence at once, in chunks beside other rows, and token by token, its pages wherever they are."""
    random = torch.Generator().manual_seed(window)
    heads, kv_heads, head_dim, page, length = 6, 2, 20, 8, 150
    (kernel,) = [k for k in INVARIANT["extend_attention"] if k.applies({"q": spec(heads * head_dim)}, {})]
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": 0.3, "window": window}
    pages = -(-length // page)
    k, v = (torch.randn(2, length, kv_heads, head_dim, generator=random).to(dtype) for _ in range(2))
    q = torch.randn(2, length, heads * head_dim, generator=random)

    def step(chunks: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Attention of tokens ``begin : end`` of sequences, as rows of one step over freshly placed pages."""
        order = torch.randperm(2 * pages, generator=random) + 1
        table = torch.zeros(len(chunks) + 1, pages, dtype=torch.int32)
        caches = [torch.full((2 * pages + 1, page, kv_heads, head_dim), 0.0).to(dtype) for _ in range(2)]
        for cache, x in zip(caches, (k, v), strict=True):
            for s in range(2):
                padded = torch.zeros(pages * page, kv_heads, head_dim).to(dtype)
                padded[:length] = x[s]
                cache.view(torch.uint8 if dtype == torch.float8_e4m3fn else dtype)[
                    order[s * pages : (s + 1) * pages]
                ] = padded.view(pages, page, kv_heads, head_dim).view(
                    torch.uint8 if dtype == torch.float8_e4m3fn else dtype
                )
        counts = [end - begin for _, begin, end in chunks]
        for row, (s, _, _) in enumerate(chunks):
            table[row] = order[s * pages : (s + 1) * pages]
        starts = [sum(counts[:r]) for r in range(len(counts))]
        operands = {
            "q": torch.cat([q[s, begin:end] for s, begin, end in chunks] + [torch.ones(3, heads * head_dim)]),
            "k_cache": caches[0],
            "v_cache": caches[1],
            "page_table": table,
            "query_start": int32([*starts, 0]),
            "query_len": int32([*counts, 0]),
            "context_len": int32([*(end for _, _, end in chunks), 0]),
        }
        y = results_of(kernel, operands, attrs)["y"]
        assert not y[sum(counts) :].any(), "tokens of no row"
        return list(y[: sum(counts)].split(counts))

    ((whole,), (other,)) = step([(0, 0, length)]), step([(1, 0, length)])
    for begin, end in ((0, 1), (0, 64), (5, 70), (63, 66), (100, 149), (148, 150)):
        alone, beside = step([(0, begin, end), (1, 149 - begin, 150)])
        assert torch.equal(alone, whole[begin:end])
        assert torch.equal(beside, other[149 - begin :])
    for at in (0, 1, 36, 37, 63, 64, 127, 149):
        (made, _) = step([(0, at, at + 1), (1, 0, at + 1)])
        assert torch.equal(made, whole[at : at + 1])


def spec(width: int) -> TensorSpec:
    return TensorSpec((1, width), "float32")


def test_keys_and_values_are_the_same_in_every_step():
    random = torch.Generator().manual_seed(0)
    for norm in (False, True):
        (kernel, *_) = INVARIANT["norm_rope_kv_write"]
        operands = {
            "qkv": in_columns(torch.randn(100, 5 * 22, generator=random)),
            "rows": torch.randn(100, 14, generator=random),
            "kv_slot": torch.randperm(120, generator=random)[:100].int(),
        }
        if norm:
            operands |= {name: torch.randn(22, generator=random) for name in ("q_norm", "k_norm")}
        attrs = {"heads": 3, "kv_heads": 1, "head_dim": 22, "eps": 1e-6}

        def step(first, last, operands=operands, attrs=attrs, kernel=kernel):
            caches = {
                name: torch.zeros(15, 8, 1, 22, dtype=torch.bfloat16) for name in ("k_cache", "v_cache")
            }
            part = {k: x if k.endswith("norm") else x[first:last] for k, x in operands.items()}
            return results_of(kernel, part | caches, attrs)["q"], caches

        q, caches = step(0, 100)
        for first, last in ((0, 1), (1, 2), (99, 100), (3, 10), (0, 65), (17, 100)):
            made, written = step(first, last)
            assert torch.equal(made, q[first:last])
            slots = operands["kv_slot"][first:last].long()
            for name, cache in written.items():
                assert torch.equal(cache.flatten(0, 1)[slots], caches[name].flatten(0, 1)[slots])


def summed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x[T, K] @ weight[N, K].T`` in fp32, one addition after the other along K, as they are given."""
    y = torch.zeros(len(x), len(weight))
    for k in range(x.shape[1]):
        y += x[:, k : k + 1] * weight[:, k]
    return y


@pytest.mark.parametrize("rows", [7, 14, 33])
def test_a_product_that_depends_on_the_place_is_refused(rows, monkeypatch):
    """One that takes another way through K for the rows behind the last whole panel, on every processor."""
    weight = torch.randn(64, 129, generator=torch.Generator().manual_seed(1))

    def multiply(x: torch.Tensor) -> torch.Tensor:
        whole = len(x) // 6 * 6
        return torch.cat([summed(x[:whole], weight), summed(x[whole:].flip(1), weight.flip(1))])

    with pytest.raises(ValueError, match=r"equal rows different bits.*without plan\.deterministic"):
        linear_cpu.prove_invariant(multiply, rows, 129)
    linear_cpu.prove_invariant(lambda x: linear_cpu.in_panels(multiply, x), rows, 129)
    monkeypatch.setattr(linear_cpu, "_PANEL", 7)
    with pytest.raises(ValueError, match="equal rows different bits"):
        linear_cpu.prove_invariant(lambda x: linear_cpu.in_panels(multiply, x), rows, 129)


def test_a_plan_is_refused_where_the_library_gives_equal_rows_different_bits(monkeypatch):
    """The check stands between every deterministic projection and its first step."""
    weight = torch.randn(8, 33, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(
        linear_cpu,
        "invariant_product",
        lambda w: lambda x: (x @ weight.T).add_(torch.arange(len(x))[:, None]),
    )
    for name in ("blocks", "panels_fp16"):
        kernel = registry.find("linear", name, "cpu")
        with pytest.raises(ValueError, match=r"without plan\.deterministic"):
            kernel.bound([torch.zeros(3, 33), weight, None], [torch.zeros(3, 8)], {"out_dtype": ""})


def test_rows_of_the_real_library(library, record_property):
    """A report, not a demand: at which numbers of rows this machine's products depend on them.

    ``pytest -rP`` prints it. FBGEMM and MKL choose their ways by the processor, so nothing is right or wrong
    here; what a plan relies on is proved when it is bound, and refused otherwise.
    """
    weight = torch.randn(64, 129, generator=torch.Generator().manual_seed(1)).half()
    products = {"fp32": lambda x: x @ weight.float().T, "blocks": linear_cpu.invariant_product(weight)}
    packed = linear_cpu.pack(weight)
    if not isinstance(packed, torch.Tensor):
        products["fp16"] = packed.multiply
        products["panels"] = linear_cpu.invariant_product(packed)
    for name, multiply in products.items():
        differ = [rows for rows in range(2, 41) if not is_invariant(multiply, rows)]
        record_property(name, str(differ))
        print(f"{name}: rows {differ or 'of any number'} {'differ' if differ else 'agree'}")
        assert torch.allclose(multiply(torch.eye(129)), weight.float().T, rtol=1e-3, atol=1e-6), name


def is_invariant(multiply: Callable[[torch.Tensor], torch.Tensor], rows: int) -> bool:
    try:
        linear_cpu.prove_invariant(multiply, rows, 129)
    except ValueError:
        return False
    return True
