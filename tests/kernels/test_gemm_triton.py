"""The GPU's dense projections without a GPU: interpreted against the reference, and cross-compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from makeready.kernels.contract import Contract
from makeready.kernels.device import Descriptor, OpCall, Pointer, Scalar, Scratch, Tensor
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_cost import seconds, tilings
from makeready.kernels.gemm.linear_tiling import PERSISTENT, STREAM, Product
from makeready.kernels.gemm.linear_triton import candidates, describe, linear_cuda

assert isinstance(linear, Contract)

_ALL = frozenset({"tma", "wgmma", "pdl"})
_MATRICES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


def _call(
    T: int,
    N: int,
    K: int,
    *,
    dtype: str = "bfloat16",
    weight: str = "",
    out: str = "",
    bias: bool = False,
    x_stride: int = 0,
    features: frozenset[str] = _ALL,
    spare: bool = False,
) -> OpCall:
    tensors = {
        "x": Tensor((T, K), dtype, x_stride or K, 256, spare),
        "weight": Tensor((N, K), weight or dtype, K, 256),
        "y": Tensor((T, N), out or dtype, N, 256),
    }
    if bias:
        tensors["bias"] = Tensor((N,), dtype, 1, 256)
    return OpCall("linear", tensors, {"out_dtype": out}, {"T": T, "N": N, "K": K}, T, T, features=features)


def test_every_call_has_a_way_and_the_choice_is_repeatable():
    for T, (N, K) in ((t, m) for t in _ROWS for m in (*_MATRICES, (131, 96), (7, 3))):
        call = _call(T, N, K)
        assert linear_cuda(call)
        assert linear_cuda(call) == linear_cuda(call)


def test_launches_cover_the_result_and_scratch_holds_every_split():
    for T, (N, K) in ((t, m) for t in (1, 17, 64, 300) for m in (*_MATRICES, (131, 96))):
        call = _call(T, N, K)
        product = describe(call)
        for way, candidate in zip(tilings(product), candidates(call), strict=True):
            (launch,) = candidate.launches
            blocks_t, blocks_n = -(-T // way.t), -(-N // way.n)
            if way.kind == PERSISTENT:
                assert launch.grid == (min(blocks_t * blocks_n, 132), 1, 1)
                continue
            assert launch.grid == (blocks_t * blocks_n * way.split, 1, 1)
            if way.split == 1:
                assert candidate.scratch == 0
                continue
            sums = launch.arguments["partial"]
            assert isinstance(sums, Scratch)
            assert 4 * blocks_t * blocks_n <= candidate.zeroed == sums.offset
            assert candidate.scratch - sums.offset == 4 * way.split * blocks_t * blocks_n * way.t * way.n


def test_both_accumulators_of_a_tile_cover_its_outputs():
    for T in (256, 8192):
        call = _call(T, 24576, 4096)
        seen = 0
        for way, candidate in zip(tilings(describe(call)), candidates(call), strict=True):
            (launch,) = candidate.launches
            first, second = (launch.constants[name] for name in ("BN", "SECOND"))
            assert isinstance(first, int)
            assert isinstance(second, int)
            assert first + second == way.n
            assert second in (0, first // 2)
            seen += second > 0
            if way.kind == PERSISTENT and second:
                y = launch.arguments["y"]
                assert isinstance(y, Descriptor)
                assert y.block == (way.t, second)
        assert seen > 0


def test_maps_of_operands_with_spare_rows_have_no_bounds_inside_a_tile():
    for T in (1, 3, 160, 192):
        for spare in (False, True):
            call = _call(T, 4096, 4096, spare=spare)
            for way, candidate in zip(tilings(describe(call)), candidates(call), strict=True):
                (launch,) = candidate.launches
                x = launch.arguments["x"]
                assert isinstance(x, Descriptor)
                assert x.shape == (-(-T // way.t) * way.t if spare else T, 4096)
                y = launch.arguments["y"]
                assert not isinstance(y, Descriptor) or y.shape == (T, 4096)


def test_shared_memory_stays_within_the_target():
    for limit in (101376, 166912, 232448):  # RTX 5090, A100, H100
        product = Product(256, 4096, 4096, 2, True, True, True, True, 132, limit)
        assert all(way.shared(product) <= limit for way in tilings(product))


def test_few_rows_cost_what_streaming_the_weights_costs():
    for N, K in _MATRICES:
        product = describe(_call(16, N, K))
        best = tilings(product)[0]
        assert best.kind == STREAM
        assert 2 * N * K / 3.0e12 < seconds(product, best) < 2 * N * K / 3.0e12 + 6e-6


def test_operands_that_tma_cannot_address_go_through_pointers():
    for call in (
        _call(4, 64, 100),  # rows of 200 bytes
        _call(4, 64, 96, x_stride=97),
        _call(4, 64, 96, features=frozenset()),
    ):
        for candidate in candidates(call):
            (launch,) = candidate.launches
            assert not any(isinstance(a, Descriptor) for a in launch.arguments.values())


def test_one_model_needs_few_distinct_kernels():
    kernels = set()
    for T, (N, K) in ((t, m) for t in _ROWS for m in _MATRICES):
        (launch,) = linear_cuda(_call(T, N, K))[0].launches
        kernels.add((launch.function, tuple(launch.constants.items()), launch.num_warps, launch.num_stages))
    assert len(kernels) <= 40


# The interpreter is switched on by an environment variable that Triton reads when a kernel is defined,
# so interpreted kernels live in a process of their own.
_SHAPES = (
    # T, N, K, dtype of x, of weight, of y, bias, row stride of x
    (1, 131, 96, "float16", "float16", "float16", False, 96),
    (3, 64, 100, "float16", "float16", "float32", True, 100),
    (17, 200, 520, "float16", "float16", "float16", True, 1040),
    (33, 65, 600, "float32", "float32", "float32", False, 600),
    (5, 40, 64, "float32", "float16", "float32", True, 70),
    (70, 130, 768, "float16", "float16", "float16", False, 768),
)


def test_interpreted_kernels_agree_with_the_reference():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    code = f"from {__name__} import interpret; interpret()"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment["PYTHONPATH"] = path
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout)
    assert any("_k2_" in name for name in errors)
    assert len(errors) > len(_SHAPES)
    for name, (error, allowed) in errors.items():
        assert error <= allowed, name


def interpret() -> None:
    """Print ``{candidate: [error, allowed]}`` of every distinct way through the pointer kernel."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_for_numpy_2_4(tensor, scope):  # which no longer takes arrays of one element for an index
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_for_numpy_2_4
    errors: dict[str, tuple[float, float]] = {}
    for T, N, K, dtype, weight, out, bias, stride in _SHAPES:
        call = _call(
            T, N, K, dtype=dtype, weight=weight, out=out, bias=bias, x_stride=stride, features=frozenset()
        )
        generator = torch.Generator().manual_seed(T)
        wide = torch.randn(T, stride, generator=generator).to(getattr(torch, dtype))
        tensors = {
            "x": wide[:, :K],
            "weight": torch.randn(N, K, generator=generator).to(getattr(torch, weight)),
            "y": torch.full((T, N), float("nan"), dtype=getattr(torch, out)),
        }
        if bias:
            tensors["bias"] = torch.randn(N, generator=generator).to(getattr(torch, dtype))
        want = linear.reference(
            *(tensors[k].double() if k in tensors else None for k in ("x", "weight", "bias"))
        )
        errors |= _interpreted(call, tensors, want)
    print(json.dumps(errors))


def _interpreted(call, tensors, want) -> dict[str, tuple[float, float]]:
    """Error and allowance of every distinct way to run ``call`` through pointers."""
    errors: dict[str, tuple[float, float]] = {}
    tried: set[tuple[int, int]] = set()
    for way, candidate in zip(tilings(describe(call)), candidates(call), strict=True):
        if (way.t, way.split) in tried or way.t > 64:
            continue
        tried.add((way.t, way.split))
        (launch,) = candidate.launches
        tensors["y"].fill_(float("nan"))
        _run_interpreted(launch, tensors, candidate.scratch, candidate.zeroed)
        error = float((tensors["y"].double() - want).norm() / want.norm())
        allowed = getattr(linear.tolerance, call.tensors["y"].dtype)
        errors[f"{call.op} {call.dims} {candidate.name}"] = (9.0 if error != error else error, allowed)
    return errors


def _run_interpreted(launch, tensors, nbytes: int, zeroed: int) -> None:
    from importlib import import_module

    scratch = torch.full((max(nbytes, 1),), 0xFF, dtype=torch.uint8)
    scratch[:zeroed] = 0
    values = {}
    for name, argument in launch.arguments.items():
        if isinstance(argument, Pointer):
            values[name] = tensors[argument.operand]
        elif isinstance(argument, Scratch):
            values[name] = scratch[argument.offset :].view(getattr(torch, argument.dtype))
        else:
            assert isinstance(argument, Scalar)
            values[name] = argument.value
    module, _, function = launch.function.partition(":")
    getattr(import_module(module), function)[launch.grid](**values, **launch.constants)
    assert not scratch[:zeroed].any(), "counters are not zero again"


@pytest.mark.parametrize(
    ("call", "arch", "wanted"),
    [
        (_call(16, 4096, 4096), 90, ("wgmma.mma_async", "cp.async.bulk.tensor", "prefetch.L2")),
        (_call(128, 6144, 4096), 90, ("wgmma.mma_async", "cp.async.bulk.tensor")),
        (_call(4096, 6144, 4096, bias=True), 90, ("wgmma.mma_async", "cp.async.bulk.tensor")),
        (_call(256, 24576, 4096, spare=True), 90, ("wgmma.mma_async", "cp.async.bulk.tensor")),
        (_call(16, 200, 4096, features=frozenset()), 80, ("mma.sync", "cp.async.cg")),
        (_call(7, 131, 100, out="float32"), 90, ("wgmma.mma_async",)),
        (_call(7, 131, 96, dtype="float32"), 90, ("fma.rn.f32",)),
    ],
    ids=lambda value: (
        f"{value.op}_T{value.dims['T']}_y{value.tensors['y'].shape[1]}" if isinstance(value, OpCall) else None
    ),
)
def test_cross_compiled_kernels_use_the_units_they_should(call: OpCall, arch: int, wanted: tuple[str, ...]):
    pytest.importorskip("triton")
    from makeready.graphs.planner.cuda.aot import compile_launch

    (launch,) = linear_cuda(call)[0].launches
    made = compile_launch(launch, call, arch)
    assert made.spill_bytes == 0
    assert made.shared <= call.shared_bytes
    assert all(instruction in made.ptx for instruction in wanted)
    if arch >= 90:
        assert made.waits


@pytest.mark.parametrize("out", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_first_choices_store_rows_of_odd_widths_without_spilling(out: str, bias: bool):
    """A router beside the gate of a shared expert has 513 outputs, which are stored one by one."""
    pytest.importorskip("triton")
    from makeready.graphs.planner.cuda.aot import compile_launch

    call = _call(6144, 513, 2048, out=out, bias=bias, spare=True)
    (launch,) = linear_cuda(call)[0].launches
    assert compile_launch(launch, call).spill_bytes == 0


def test_tiles_whose_results_are_stored_one_by_one_leave_registers_for_addresses():
    for T, N in ((t, n) for t in (16, 256, 2048, 4096, 6144, 8192) for n in (129, 257, 513, 520)):
        ways = tilings(describe(_call(T, N, 2048, out="float32")))
        assert ways
        assert all(way.kind == PERSISTENT or way.t * way.n <= 64 * 32 * way.warps for way in ways)


@pytest.mark.parametrize(
    "call",
    [_call(16, 4096, 4096), _call(256, 24576, 4096), _call(1024, 6144, 4096)],
    ids=lambda call: f"{call.op}_T{call.dims['T']}",
)
@pytest.mark.slow
def test_matrix_instructions_do_not_wait_for_each_other(call: OpCall):
    """The assembler waits behind each where it cannot follow the accumulators, and says so nowhere."""
    pytest.importorskip("triton")
    import tempfile

    from makeready.graphs.planner.cuda import aot

    for candidate in linear_cuda(call)[:3]:
        (launch,) = candidate.launches
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(aot.compile_launch(launch, call).cubin)
            file.flush()
            command = [str(aot._CUOBJDUMP), "--dump-sass", file.name]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        products, waits = sass.count("HGMMA"), sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x0")
        assert products > waits, candidate.name
