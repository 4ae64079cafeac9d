"""Norms, element-wise ops, gathers and rotary rows on a GPU against float64 references."""

from __future__ import annotations

import importlib

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu.launcher import check, op_call, run  # noqa: E402
from inputs import BUILDERS  # noqa: E402

from makeready.kernels import elementwise, embedding, norm, registry, rope  # noqa: E402
from makeready.kernels.step import locate  # noqa: E402

for module in ("norm", "elementwise", "embedding", "rope", "step.locate"):
    importlib.import_module(f"makeready.kernels.{module}_triton")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 64), (3, 131), (8, 576), (1, 4096), (64, 4096), (256, 12288), (2050, 1000), (3, 16384)]


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def columns_of(x, margin=16):
    """``x`` as columns of a wider tensor, NaN elsewhere."""
    wide = torch.full((x.shape[0], x.shape[1] + margin), float("nan"), dtype=x.dtype, device="cuda")
    return wide[:, margin // 2 : margin // 2 + x.shape[1]].copy_(x)


def check_all(contract, tensors, attrs=None):
    kernels = registry.cuda_kernels(contract.name)
    assert kernels
    for kernel in kernels:
        check(contract, kernel.candidates, tensors, attrs)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_norms(tokens, width, dtype):
    x, weight = columns_of(random(tokens, width, dtype=dtype, scale=3)), random(width, dtype=dtype)
    check_all(norm.rms_norm, {"x": x, "weight": weight}, {"eps": 1e-6})
    residual = random(tokens, width, dtype=dtype)
    tensors = {"x": x, "residual": residual, "weight": weight.float()}
    check_all(norm.add_rms_norm, tensors, {"eps": 1e-5})
    check_all(norm.rms_norm, {"x": x, "weight": weight}, {"eps": 1e-6, "offset": 1.0})
    check_all(norm.add_rms_norm, tensors, {"eps": 1e-5, "offset": 1.0})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(1, 32, 128), (3, 9, 64), (1000, 8, 128), (257, 5, 80)]
)
def test_heads(tokens, heads, head_dim, dtype):
    x = columns_of(random(tokens, heads * head_dim, dtype=dtype))
    attrs = {"heads": heads, "head_dim": head_dim}
    check_all(norm.head_rms_norm, {"x": x, "weight": random(head_dim, dtype=dtype)}, {"eps": 1e-6, **attrs})
    for rotary in (head_dim, head_dim // 4 * 2):
        angle = torch.rand(tokens, rotary // 2, device="cuda") * 6
        rows = torch.cat((angle.cos(), angle.sin()), 1)
        check_all(rope.rope, {"x": x, "rows": rows}, attrs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_pointwise(tokens, width, dtype):
    x, y = columns_of(random(tokens, width, dtype=dtype)), random(tokens, width, dtype=dtype)
    check_all(elementwise.add, {"x": x, "y": y})
    check_all(elementwise.multiply, {"x": y, "y": x})
    check_all(elementwise.silu, {"x": x})
    check_all(elementwise.gelu_tanh, {"x": x})
    check_all(
        elementwise.gelu_tanh_mul, {"gate_up": columns_of(random(tokens, 2 * width, dtype=dtype, scale=4))}
    )
    check_all(elementwise.scale, {"x": x}, {"by": 25.25})
    check_all(elementwise.scale_columns, {"x": x, "scale": random(width)})
    check_all(elementwise.sigmoid_gate, {"x": x, "gate": columns_of(random(tokens, 1))})
    check_all(elementwise.silu_mul, {"gate_up": columns_of(random(tokens, 2 * width, dtype=dtype, scale=4))})


@pytest.mark.parametrize(("rows", "width"), [(1, 131), (3, 4096), (256, 4096), (64, 49152)])
def test_gather_last(rows, width):
    lengths = torch.randint(0, 4, (rows,))
    start = lengths.cumsum(0) - lengths
    tokens = int(lengths.sum()) + 1
    tensors = {
        "x": columns_of(random(tokens, width, dtype=torch.bfloat16)),
        "query_start": start.int().cuda(),
        "query_len": lengths.int().cuda(),
    }
    check_all(elementwise.gather_last, tensors)


@pytest.mark.parametrize("tokens", [1, 3, 64, 2500])
@pytest.mark.parametrize("width", [64, 131, 4096])
def test_row_fetches(tokens, width):
    ids = torch.randint(0, 151, (tokens,)).int().cuda()
    weight = random(151, width, dtype=torch.bfloat16)
    check_all(embedding.embedding, {"ids": ids, "weight": weight})
    check_all(embedding.embedding, {"ids": ids, "weight": weight}, {"out_dtype": "float32"})
    check_all(rope.rope_rows, {"positions": ids, "table": random(151, 2 * (width // 2))})


def test_embedding_beyond_32_bits():
    weight = torch.empty(600_000, 4096, dtype=torch.bfloat16, device="cuda")
    ids = torch.tensor([0, 599_999, 524_288, 524_287], dtype=torch.int32, device="cuda")
    weight[ids.long()] = random(4, 4096, dtype=torch.bfloat16)
    tensors = {"ids": ids, "weight": weight}
    call = op_call(embedding.embedding, tensors)
    for kernel in registry.cuda_kernels("embedding"):
        for candidate in kernel.candidates(call):
            assert run(candidate, call, tensors)["x"].equal(weight[ids.long()])


@pytest.mark.parametrize("op", [locate.locate, locate.find_pages])
def test_steps_find_their_places(op):
    for case in BUILDERS[op.name](op.name):
        check_all(op, {k: v.cuda() for k, v in case.operands.items()}, case.attrs)


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_dynamic_rope_rows(tokens):
    tensors = {
        "positions": torch.randint(0, 60000, (tokens,)).int(),
        "token_slot": torch.randint(0, 5, (tokens,)).int(),
        "prompt_len": torch.tensor([1, 50, 5000, 40000, 60000]).int(),
    }
    attrs = {"rotary_dim": 96, "theta": 10000.0, "factor": 4.0, "original_context": 4096}
    want = rope.rope_rows_dynamic.reference(**tensors, **attrs)
    # The reference is fp32 by its nature: a last-bit difference of a frequency turns a pair by this much.
    allowed = 2e-7 * (8 + tensors["positions"].unsqueeze(1))
    on_device = {k: v.cuda() for k, v in tensors.items()}
    call = op_call(rope.rope_rows_dynamic, on_device, attrs)
    for kernel in registry.cuda_kernels("rope_rows_dynamic"):
        for candidate in kernel.candidates(call):
            got = run(candidate, call, on_device)["rows"].cpu()
            assert ((got - want).abs() <= allowed).all()
