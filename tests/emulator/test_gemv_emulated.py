"""Products of one row in CUDA C++, emulated on the CPU, against the contracts' references in float64.

Everything lies between NaN: weights, the row, and what the launch writes, which must still be there afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import Emulator, needs_compiler, op_call

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm import gemv_cuda

pytestmark = needs_compiler
B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
_GUARD = 64  # elements of NaN on both sides
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` between NaN."""
    room = torch.full((x.numel() + 2 * _GUARD,), math.nan, dtype=x.dtype)
    inside = room[_GUARD : _GUARD + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside


def is_guarded(x: torch.Tensor) -> bool:
    """Whether nothing was written around what :func:`guarded` gave."""
    whole = x.storage_offset(), x.numel()
    room = torch.as_strided(x, (whole[1] + 2 * _GUARD,), (1,), whole[0] - _GUARD)
    return bool(room[:_GUARD].isnan().all() and room[-_GUARD:].isnan().all())


def make(
    N: int,
    K: int,
    dtype: torch.dtype = B16,
    *,
    bias: bool = False,
    norm: str = "",
    fp8: bool = False,
    seed: int = 0,
) -> Tensors:
    """Operands of a product, of weights of 8 bits if they are to be; of the ``norm`` before it, too."""
    random = torch.Generator().manual_seed(seed)
    made = {
        "x": 3 * torch.randn(1, K, generator=random),
        "weight": torch.randn(N, K, generator=random) / math.sqrt(K),
    }
    if bias:
        made["bias"] = torch.randn(N, generator=random)
    if norm:
        made["gain"] = 1 + 0.3 * torch.randn(K, generator=random)
    if norm == "add_rms_norm":
        made["residual"] = 5 * torch.randn(1, K, generator=random)
    if norm == "silu_mul":
        made["gate_up"] = torch.cat((made.pop("x"), torch.randn(1, K, generator=random)), 1)
    tensors = {name: guarded(x.to(dtype)) for name, x in made.items()}
    if fp8:
        bits = (60 * torch.randn(N, K, generator=random)).clamp(-448, 448).to(torch.float8_e4m3fn)
        room = torch.full((N * K + 2 * _GUARD,), 127, dtype=torch.uint8)  # NaN
        tensors["weight"] = room.view(torch.float8_e4m3fn)[_GUARD:-_GUARD].view(N, K)
        tensors["weight"].view(torch.uint8).copy_(bits.view(torch.uint8))
        tensors["weight_scale"] = guarded(0.01 + torch.rand(N, generator=random))
    return tensors


def emulate(
    emulator: Emulator, op: str, tensors: Tensors, attrs: Mapping[str, Any], *, grid: int = 3, seed: int = 0
) -> Tensors:
    """Results of the one way that there is."""
    call = op_call(op, tensors, attrs, multiprocessors=grid)
    (way,) = next(k for k in registry.cuda_kernels(op) if k.name == "gemv").candidates(call)
    results = {
        o.name: guarded(
            torch.full(call.tensors[o.name].shape, 7.0, dtype=getattr(torch, call.tensors[o.name].dtype))
        )
        for o in CONTRACTS[op].outputs
    }
    made = emulator.run(way, call, {**tensors, **results}, seed=seed)
    assert all(is_guarded(made[name]) for name in results)
    return {name: made[name] for name in results}


def error(op: str, tensors: Tensors, attrs: Mapping[str, Any], got: Tensors) -> float:
    """The largest of the results' errors, relative, by Frobenius norms; NaN where one has a NaN."""
    wide = {k: v.double() for k, v in tensors.items()}
    contract = CONTRACTS[op]
    arguments = [wide.get(o.name) for o in contract.inputs]
    want = contract.reference(*arguments, **{**contract.attrs, **attrs, "out_dtype": "float64"})
    wants = dict(
        zip((o.name for o in contract.outputs), want if isinstance(want, tuple) else (want,), strict=True)
    )
    return max(float((got[n].double() - w).norm() / w.norm()) for n, w in wants.items())


# Outputs, inputs: rings that are filled once and many times, inputs that not all threads have, stages with a rest.
SHAPES = [(1, 64), (5, 512), (37, 2048), (64, 2056), (200, 896), (61, 4096), (9, 12288), (700, 96)]


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_linear(emulator: Emulator, N: int, K: int) -> None:
    tensors = make(N, K)
    for grid in (1, 3):
        got = emulate(emulator, "linear", tensors, {}, grid=grid, seed=N + grid)
        assert error("linear", tensors, {}, got) < 4e-3


@pytest.mark.parametrize(("dtype", "out"), [(F16, ""), (F16, "float32"), (B16, "float32")])
def test_dtypes_and_biases(emulator: Emulator, dtype: torch.dtype, out: str) -> None:
    tensors = make(50, 512, dtype, bias=True)
    got = emulate(emulator, "linear", tensors, {"out_dtype": out})
    assert got["y"].dtype == (F32 if out else dtype)
    assert error("linear", tensors, {}, got) < (1e-6 if out else 4e-3 if dtype == B16 else 1e-3)


CHAINS = {
    "rms_norm_linear": "rms_norm",
    "add_rms_norm_linear": "add_rms_norm",
    "add_rms_norm_linear_silu_mul": "add_rms_norm",
}


@pytest.mark.parametrize("op", CHAINS)
@pytest.mark.parametrize(("N", "K"), [(2, 64), (74, 896), (122, 2056), (38, 4096), (6, 8192)])
def test_chains(emulator: Emulator, op: str, N: int, K: int) -> None:
    tensors = make(N, K, norm=CHAINS[op])
    for grid, offset in ((1, 0.0), (3, 1.0)):
        attrs = {"eps": 1e-6, "offset": offset}
        got = emulate(emulator, op, tensors, attrs, grid=grid, seed=K + grid)
        assert error(op, tensors, attrs, got) < 8e-3  # the norm, too, is rounded to 16 bits


@pytest.mark.parametrize("op", CHAINS)
@pytest.mark.parametrize(("dtype", "out"), [(F16, ""), (B16, "float32")])
def test_chains_with_other_dtypes_and_biases(
    emulator: Emulator, op: str, dtype: torch.dtype, out: str
) -> None:
    tensors = make(50, 512, dtype, bias=True, norm=CHAINS[op])
    attrs = {"eps": 0.1, "offset": 0.0, "out_dtype": out}
    assert error(op, tensors, attrs, emulate(emulator, op, tensors, attrs)) < (4e-3 if dtype == B16 else 1e-3)


FP8_CHAINS = {
    "quantize_fp8_linear_fp8": "",
    "rms_norm_quantize_fp8_linear_fp8": "rms_norm",
    "add_rms_norm_quantize_fp8_linear_fp8": "add_rms_norm",
    "silu_mul_quantize_fp8_linear_fp8": "silu_mul",
}


def fp8_attrs(op: str, K: int, **more: Any) -> dict[str, Any]:
    norm = {"eps": 1e-6, "offset": 0.0} if "norm" in FP8_CHAINS[op] else {}
    return {"group": K, "out_dtype": "bfloat16", **norm, **more}


def fp8_error(op: str, tensors: Tensors, attrs: Mapping[str, Any], got: Tensors) -> float:
    """As :func:`error`, by the reference on the operands' own dtypes: what is quantized has 16 bits."""
    contract = CONTRACTS[op]
    want = contract.reference(*(tensors.get(o.name) for o in contract.inputs), **attrs)
    wants = dict(
        zip((o.name for o in contract.outputs), want if isinstance(want, tuple) else (want,), strict=True)
    )
    return max(float((got[n].double() - w.double()).norm() / w.double().norm()) for n, w in wants.items())


@pytest.mark.slow
@pytest.mark.parametrize("op", FP8_CHAINS)
@pytest.mark.parametrize(("N", "K"), [(1, 64), (74, 880), (61, 4112), (38, 4096), (9, 12288)])
def test_chains_of_8_bits(emulator: Emulator, op: str, N: int, K: int) -> None:
    """An element in some hundreds may round to its other neighbour."""
    tensors = make(N, K, norm=FP8_CHAINS[op], fp8=True, bias=N == 74)
    for grid in (1, 3):
        got = emulate(emulator, op, tensors, fp8_attrs(op, K), grid=grid, seed=K + grid)
        assert fp8_error(op, tensors, fp8_attrs(op, K), got) < 8e-3


def block_operands(N: int, K: int, *, bias: bool) -> Tensors:
    """Of a product whose scales are of groups and squares of 128."""
    random = torch.Generator().manual_seed(N + K)
    tensors = make(N, K, fp8=True, bias=bias)
    room = torch.full((K + 2 * _GUARD,), 127, dtype=torch.uint8)  # NaN
    x = (100 * torch.randn(1, K, generator=random)).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors["x"] = room.view(torch.float8_e4m3fn)[_GUARD:-_GUARD].view(1, K)
    tensors["x"].view(torch.uint8).copy_(x.view(torch.uint8))
    tensors["x_scale"] = guarded(0.01 + torch.rand(1, K // 128, generator=random))
    tensors["weight_scale"] = guarded(0.01 + torch.rand(-(-N // 128), K // 128, generator=random))
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize(("N", "K"), [(1, 128), (130, 640), (300, 2048), (61, 4096), (257, 4224), (9, 12288)])
def test_squares_of_scales(emulator: Emulator, N: int, K: int) -> None:
    """Blocks of the launch begin, and squares end, anywhere."""
    tensors = block_operands(N, K, bias=N == 130)
    for grid in (1, 3):
        attrs = {"block": 128, "out_dtype": "bfloat16"}
        got = emulate(emulator, "linear_fp8_block", tensors, attrs, grid=grid, seed=K + grid)
        assert error("linear_fp8_block", tensors, attrs, got) < 4e-3


def test_a_row_of_zeros_in_8_bits(emulator: Emulator) -> None:
    op, tensors = "quantize_fp8_linear_fp8", make(40, 512, fp8=True)
    tensors["x"].zero_()
    assert not emulate(emulator, op, tensors, fp8_attrs(op, 512))["y"].any()


def test_the_sum_is_stored_as_the_ops_one_by_one_do(emulator: Emulator) -> None:
    """To the last bit, and the norm is of what is stored."""
    tensors = make(10, 2056, norm="add_rms_norm")
    got = emulate(emulator, "add_rms_norm_linear", tensors, {"eps": 1e-6})
    stored = (tensors.pop("x").float() + tensors.pop("residual").float()).to(B16)
    assert torch.equal(got["residual_out"], stored)
    again = emulate(emulator, "rms_norm_linear", {"x": guarded(stored), **tensors}, {"eps": 1e-6})
    assert torch.equal(got["y"], again["y"])


def test_order_and_number_of_blocks_do_not_matter(emulator: Emulator) -> None:
    """To the last bit: every output is the work of one block."""
    tensors = make(83, 2048)
    ways = [
        emulate(emulator, "linear", tensors, {}, grid=g, seed=s)["y"] for g, s in ((1, 1), (2, 2), (7, 5))
    ]
    assert all(torch.equal(ways[0], other) for other in ways[1:])


FAULTS = {
    "bytes are miscounted": ("GATE ? 2 * bytes : bytes);", "GATE ? 2 * bytes : bytes - 16);"),
    "places are not waited for": ('    mbar_wait(&free[s], ((i / STAGES) & 1) ^ 1, "feed: free");\n', ""),
    "weights are not waited for": ('    mbar_wait(&full[s], (i / STAGES) & 1, "multiply: full");\n', ""),
    "places are not given back": ("    if (lane == 0) mbar_arrive(&free[s]);\n", ""),
    "the row is read before it is there": ("  dependence_wait();\n  float xs", "  float xs"),
    "weights of other outputs": ("(int64_t)(from + i * OUTS) * ROW", "(int64_t)(from + i) * ROW"),
    "sums of warps are not waited for": ("    named_sync(1, THREADS);\n    int first", "    int first"),
    "a flush is dropped": ("&& i < stages - 1) continue;", ") continue;"),
    "outputs of another block": ("int out = from + first + t;", "int out = first + t;"),
    "inputs beyond the last": ("|| (chunk * THREADS + t) * PIECE < K;", "|| true;"),
}  # fmt: skip
CHAIN_FAULTS = {
    "bytes of one half": ("GATE ? 2 * bytes : bytes);", "bytes);"),
    "the gate twice": ("rows + (int64_t)n * ROW, &full[s]", "rows, &full[s]"),
    "halves are exchanged": ("(stage * ROWS + OUTS + place) * WARPS", "(stage * ROWS + place) * WARPS"),
    "squares of one warp": (": all + of_warps[w];", ": all;"),
    "squares are not waited for": ("  named_sync(1, THREADS);\n  float all", "  float all"),
    "no block stores the sum": ("if (blockIdx.x == 0) *(Int4*)", "if (blockIdx.x == 9) *(Int4*)"),
    "an offset is forgotten": ("(gain[j] + offset)", "gain[j]"),
    "the residual is read before it is there": (
        "  dependence_wait();\n  float xs[PER];\n",
        "  float xs[PER];\n",
    ),
}  # fmt: skip


def planted(folder: Path, fault: tuple[str, str]) -> Emulator:
    """An emulator of the kernel with a line exchanged."""
    for name in ("hopper.h", "gemv.cu"):
        (folder / name).write_text((nvrtc.FOLDER / name).read_text())
    text = (folder / "gemv.cu").read_text()
    assert fault[0] in text
    (folder / "gemv.cu").write_text(text.replace(*fault))
    return Emulator(folder, folder)


def caught(emulator: Emulator, op: str, tensors: Tensors, attrs: Mapping[str, Any], limit: float) -> bool:
    """Whether a wrong line makes a wrong number, a NaN, a write beyond the result, or a report."""

    def right(seed: int) -> bool:
        try:
            return error(op, tensors, attrs, emulate(emulator, op, tensors, attrs, seed=seed)) < limit
        except (AssertionError, RuntimeError):
            return False

    return not all(right(seed) for seed in (4, 5, 6))


BLOCK_FAULTS = {
    "the squares of the first outputs": ("out % 128 == 0 && out < n", "false"),
    "scales of other squares": ("square * (K / 128)", "square"),
    "scales of other inputs": ("x_scale + piece / 8", "x_scale + piece / 16"),
    "the row is read before it is there": (
        "  dependence_wait();\n  float xs[PER];\n",
        "  float xs[PER];\n",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_faults_planted_in_squares_are_caught(fault: str, tmp_path: Path) -> None:
    tensors, attrs = block_operands(300, 2048, bias=False), {"block": 128, "out_dtype": "bfloat16"}
    assert caught(planted(tmp_path, BLOCK_FAULTS[fault]), "linear_fp8_block", tensors, attrs, 4e-3)


FP8_FAULTS = {
    "the scale of the row is forgotten": ("v *= scale * weight_scale[out];", "v *= weight_scale[out];"),
    "scales of other weights": ("weight_scale[out]", "weight_scale[first + t]"),
    "the largest of one warp": ("fmaxf(all, of_warps[w])", "all"),
    "the row is not rounded": (
        "widen_fp8(xs + j, pack_fp8(xs[j] * inverse, xs[j + 1] * inverse));",
        "{ xs[j] *= inverse; xs[j + 1] *= inverse; }",
    ),
    "neighbours are exchanged": ("pack_fp8(xs[j] * inverse, xs[j + 1]", "pack_fp8(xs[j + 1] * inverse, xs[j]"),
    "the up half is the gate's": ("x + K + at", "x + at"),
    "inputs of another piece": ("eight % (PIECE / 8) * 8;", "0;"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FP8_FAULTS)
def test_faults_planted_in_chains_of_8_bits_are_caught(fault: str, tmp_path: Path) -> None:
    op, tensors = "silu_mul_quantize_fp8_linear_fp8", make(82, 2064, norm="silu_mul", fp8=True)
    tensors["gate_up"][0, 2060], tensors["gate_up"][0, 2064 + 2060] = (
        20,
        9,
    )  # the largest is not the first warp's
    emulator, attrs = planted(tmp_path, FP8_FAULTS[fault]), fp8_attrs(op, 2064)
    got = emulate(emulator, op, tensors, attrs)
    assert not fp8_error(op, tensors, attrs, got) < 8e-3


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    assert caught(planted(tmp_path, FAULTS[fault]), "linear", make(83, 2056), {}, 4e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fault", CHAIN_FAULTS)
def test_faults_planted_in_chains_are_caught(fault: str, tmp_path: Path) -> None:
    op, tensors = "add_rms_norm_linear_silu_mul", make(82, 2056, norm="add_rms_norm")
    attrs = {"eps": 1e-6, "offset": 1.0}
    assert caught(planted(tmp_path, CHAIN_FAULTS[fault]), op, tensors, attrs, 5e-3)


def test_what_it_does_not_do_is_triton_s() -> None:
    tensors = make(16, 64)
    call = op_call("linear", tensors, {})
    x, weight = call.tensors["x"], call.tensors["weight"]

    def offers(**changes: Any) -> bool:
        return gemv_cuda.applies(replace(call, tensors={**call.tensors, **changes}))

    assert offers()
    assert not offers(x=replace(x, shape=(2, 64)))
    assert not offers(weight=replace(weight, dtype="float16"))
    assert not offers(x=replace(x, alignment=8))
    assert not offers(x=replace(x, shape=(1, 68)), weight=replace(weight, shape=(16, 68)))
    assert not offers(x=replace(x, shape=(1, 16392)), weight=replace(weight, shape=(16, 16392)))
