"""Dense projections on the GPU against float64, over awkward and over real shapes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu import launcher
from prepared import prepare

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_triton import candidates, linear_cuda

assert isinstance(linear, Contract)

ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 127, 128, 129, 255, 256, 300, 512, 1000)
MATRICES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
VOCABULARY = (151936, 4096)
TINY = ((131, 96), (96, 131), (8, 8), (1, 64), (200, 520), (64, 100))


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def _with_spare_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` in front of 256 rows of NaN, which tensor maps may reach."""
    wide = torch.full((len(x) + 256, x.shape[1]), float("nan"), dtype=x.dtype, device="cuda")
    wide[: len(x)] = x
    return wide[: len(x)]


def _hold(
    tensors: dict[str, torch.Tensor], *, out: str = "", every: bool = False, spare: bool = False
) -> None:
    """Hold the first choice, or all the planner's candidates, to a float64 product made on the GPU."""
    call = launcher.op_call(linear, tensors, {"out_dtype": out}, spare=spare)
    want = tensors["x"].double() @ tensors["weight"].double().T
    if "bias" in tensors:
        want += tensors["bias"].double()
    allowed = getattr(linear.tolerance, call.tensors["y"].dtype)
    ways = [way for way in linear_cuda(call) if launcher.fits(way, call)]
    for way in ways if every else ways[:1]:
        first, second = (launcher.run(way, call, tensors)["y"] for _ in range(2))
        assert torch.equal(first, second), f"{way.name} differs between two runs"
        error = ((first.double() - want).norm() / want.norm()).item()
        assert error <= allowed, f"{way.name} at {call.dims} is off by {error:.1e}"


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels of this file at once, on all cores."""
    work = []
    for N, K in (*MATRICES, VOCABULARY):
        weight = torch.empty(N, K, dtype=torch.bfloat16, device="meta")
        for T in ROWS:
            x = torch.empty(T, K, dtype=torch.bfloat16, device="meta")
            attrs = {"out_dtype": "float32" if VOCABULARY[0] == N else ""}
            call = launcher.op_call(linear, {"x": x, "weight": weight}, attrs, spare=True)
            work.append((call, linear_cuda(call)[: 6 if T in (16, 256) else 1]))
    prepare(work)


@pytest.mark.parametrize(("N", "K"), MATRICES)
def test_matrices_of_a_real_model(N: int, K: int):
    weight = _random(N, K, seed=1)
    for T in ROWS:
        x = _with_spare_rows(_random(T, K))
        _hold({"x": x, "weight": weight}, every=T in (16, 256), spare=True)


def test_bounds_inside_a_tile_without_spare_rows():
    N, K = MATRICES[1]
    weight = _random(N, K, seed=1)
    for T in (1, 17, 129, 300):
        _hold({"x": _random(T, K), "weight": weight})


def test_logits_leave_as_fp32():
    N, K = VOCABULARY
    weight = _random(N, K, seed=1)
    for T in (1, 17, 64, 129):
        x = _with_spare_rows(_random(T, K))
        _hold({"x": x, "weight": weight}, out="float32", spare=True)


@pytest.mark.parametrize(("N", "K"), TINY)
def test_odd_sizes(N: int, K: int):
    for T in (1, 3, 17, 130):
        _hold({"x": _random(T, K), "weight": _random(N, K, seed=1), "bias": _random(N, seed=2)})


@pytest.mark.parametrize(
    ("x", "weight", "out"),
    [
        (torch.float16, torch.float16, ""),
        (torch.bfloat16, torch.float16, "float32"),
        (torch.float32, torch.bfloat16, ""),
        (torch.float32, torch.float32, ""),
    ],
)
def test_other_dtypes(x: torch.dtype, weight: torch.dtype, out: str):
    for T in (5, 40):
        _hold({"x": _random(T, 576, dtype=x), "weight": _random(320, 576, dtype=weight, seed=1)}, out=out)


@pytest.mark.parametrize("start", [0, 64, 3])
def test_columns_of_a_wider_buffer_with_bias(start: int):
    for T in (4, 64, 300):
        wide = _random(T, 4096 + 512)
        tensors = {"x": wide[:, start : start + 4096], "weight": _random(1536, 4096, seed=1)}
        _hold({**tensors, "bias": _random(1536, seed=2)})


@pytest.mark.parametrize("T", [100, 192])
def test_every_way_to_cut_one_small_product(T: int):
    x, weight = _with_spare_rows(_random(T, 1024)), _random(640, 1024, seed=1) / 32
    tensors = {"x": x, "weight": weight, "bias": _random(640, seed=2)}
    want = x.double() @ weight.double().T + tensors["bias"].double()
    call = launcher.op_call(linear, tensors, spare=True)
    ways = candidates(call)
    prepare([(call, ways)])
    for way in ways:
        if launcher.fits(way, call):
            got = launcher.run(way, call, tensors)["y"].double()
            assert (got - want).norm() / want.norm() < 1e-2, way.name


def test_launches_that_start_early_wait_for_each_other():
    """Eight products in a row, each reading the last one's result, over one scratch."""
    weight = _random(4096, 4096, seed=1) / 64
    xs = [_random(16, 4096)] + [torch.empty(16, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
    call = launcher.op_call(linear, {"x": xs[0], "weight": weight})
    way = next(w for w in candidates(call) if "_k4_" in w.name)
    want = xs[0]
    for _ in range(8):
        want = launcher.run(way, call, {"x": want, "weight": weight})["y"]
    scratch = launcher.new_scratch(way)
    for _ in range(5):
        for x, y in pairwise(xs):
            stream = torch.cuda.current_stream()
            launcher.launch_all(way, call, {"x": x, "weight": weight, "y": y}, scratch, stream)
        torch.cuda.synchronize()
        assert torch.equal(xs[-1], want)
