"""Products with experts' weights in CUDA C++, emulated on the CPU, against the contracts' references in float64.

Rows of x of no entry, experts that nobody goes to, their scales, columns between rows of a wider buffer, and results
are NaN. Whatever was read without being an entry's, or not written, shows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated import Emulator, needs_compiler, op_call
from moe_operands import NAN, expert_weights

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.moe.grouped_cuda import FEW, MANY, Tile, candidate
from makeready.kernels.registry import cuda_kernels

pytestmark = [needs_compiler, pytest.mark.slow]
FILES = ("hopper.h", "wgmma.h", "experts.h", "grouped_few.cu", "grouped.cu")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def in_wide_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as columns of a wider buffer of NaN, at an address that is a multiple of 16."""
    wide = torch.full((x.shape[0], x.shape[1] + 64), NAN).to(x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def error(op: str, tensors: dict[str, torch.Tensor], attrs: dict[str, object], y: torch.Tensor) -> float:
    """Of ``y``, relative, by Frobenius norms; NaN where it has one."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    want = CONTRACTS[op].reference(**wide, **attrs | {"out_dtype": "float64"})
    assert not want.isnan().any()
    entries = int(tensors["start"][-1])
    assert not y[entries:].any(), "rows of nobody are not zeros"
    return float((y.double() - want).norm() / want.norm().clamp_min(1e-30))


def emulate(
    emulator: Emulator,
    op: str,
    tensors: dict[str, torch.Tensor],
    attrs: dict[str, object],
    tile: Tile,
    *,
    seed: int = 0,
    grid: int = 2,
) -> torch.Tensor:
    call = op_call(op, tensors, attrs, multiprocessors=grid)
    (kernel,) = (k for k in cuda_kernels(op) if k.name == "wgmma")
    assert kernel.candidates(call)
    way = candidate(call, tile)
    return emulator.run(way, call, tensors, seed=seed, grid=min(grid, way.launches[0].grid[0]))["y"]


def check(
    emulator: Emulator,
    op: str,
    kind: str,
    shape: tuple[int, ...],
    tile: Tile,
    *,
    gathered: bool,
    seed: int = 0,
    scales: str = "",
    dtype: str = "bfloat16",
) -> None:
    tokens, experts, k, outputs, inputs = shape
    tensors = expert_weights(
        tokens, experts, k, outputs, inputs, kind, gathered, dtype, dtype, scales=scales, seed=seed
    )
    if not scales:
        tensors["x"] = in_wide_rows(tensors["x"])
    attrs: dict[str, object] = {"top_k": 0 if gathered else k, "out_dtype": dtype}
    attrs |= {"block": 128} if scales == "block" else {}
    name = op + {"": "", "channel": "_fp8", "block": "_fp8_block", "int8": "_int8"}[scales]
    y = emulate(emulator, name, tensors, attrs, tile, seed=seed)
    allowed = 1e-2 if op == "grouped_silu_mul" else 5e-3
    off = error(name, tensors, attrs, y)
    assert off < (allowed if dtype == "bfloat16" else allowed / 8), (name, kind, off)


KINDS = ("spread", "one", "none", "nobody", "single")
SMALL = (9, 5, 2, 128, 128)  # tokens, experts, k, outputs, inputs


@pytest.mark.parametrize("tile", FEW, ids=lambda tile: tile.name)
@pytest.mark.parametrize("gathered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_few(emulator: Emulator, tile: Tile, gathered: bool) -> None:
    for seed, kind in enumerate(KINDS if tile == FEW[0] else KINDS[:2]):
        check(emulator, "grouped_linear", kind, SMALL, tile, gathered=gathered, seed=seed)
    check(emulator, "grouped_silu_mul", "spread", SMALL, tile, gathered=gathered, seed=7)


@pytest.mark.parametrize("scales", ["channel", "block", "int8"])
@pytest.mark.parametrize("gathered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_few_of_eight_bits(emulator: Emulator, scales: str, gathered: bool) -> None:
    for seed, op in enumerate(("grouped_linear", "grouped_silu_mul")):
        check(
            emulator, op, "spread", (9, 5, 2, 256, 256), FEW[1], gathered=gathered, seed=seed, scales=scales
        )
        check(emulator, op, "one", (9, 5, 2, 256, 256), FEW[0], gathered=gathered, seed=seed, scales=scales)


@pytest.mark.parametrize("tile", MANY, ids=lambda tile: tile.name)
@pytest.mark.parametrize("gathered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_many(emulator: Emulator, tile: Tile, gathered: bool) -> None:
    for seed, kind in enumerate(KINDS if tile == MANY[1] else KINDS[:2]):
        check(emulator, "grouped_linear", kind, (70, 3, 2, 320, 64), tile, gathered=gathered, seed=seed)
    check(emulator, "grouped_silu_mul", "spread", (70, 3, 2, 384, 64), tile, gathered=gathered, seed=7)


@pytest.mark.parametrize("scales", ["channel", "block", "int8"])
@pytest.mark.parametrize("gathered", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tile", MANY, ids=lambda tile: tile.name)
def test_many_of_eight_bits(emulator: Emulator, tile: Tile, scales: str, gathered: bool) -> None:
    if scales and tile.outputs == 256 and tile.ways == 2:
        pytest.skip("sums of groups beside as many others have no registers")
    for seed, op in enumerate(("grouped_linear", "grouped_silu_mul")):
        check(emulator, op, "spread", (70, 3, 2, 256, 256), tile, gathered=gathered, seed=seed, scales=scales)


def test_other_dtypes_and_numbers_of_experts(emulator: Emulator) -> None:
    check(
        emulator, "grouped_silu_mul", "spread", (40, 60, 4, 128, 64), FEW[0], gathered=False, dtype="float16"
    )
    check(emulator, "grouped_linear", "spread", (7, 256, 8, 64, 64), FEW[0], gathered=True)
    check(emulator, "grouped_linear", "spread", (1, 1, 1, 64, 64), FEW[2], gathered=False)


FAULTS = {
    "grouped_few.cu": {
        "an mbarrier is not arrived at": ("      if (lane == 0) mbar_arrive(&bars.tile_free[slot]);\n", ""),
        "bytes are miscounted": ("W_BYTES + (TOP_K ? 0 : X_BYTES)", "W_BYTES - 128"),
        "a wait for free places is missing": (
            '        mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "feed: free");\n',
            "",
        ),
        "rows come before their place is free": (
            '      mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "gather: free");\n',
            "",
        ),
        "rows are announced before they are there": ("mbar_arrive_after_copies", "mbar_arrive"),
        "a tile is forgotten by those who gather": ("TOP_K ? 5 : 4", "4"),
        "the other half of the gate": ("call.outputs / 2 + column, tile.expert", "column, tile.expert"),
        "scales of another group": ("outputs = of_outputs[step]", "outputs = of_outputs[0]"),
        "scales of another entry": ("8 * (h / 2) + 2 * (lane % 4) + (h & 1)", "8 * (h / 2) + 2 * (lane % 4)"),
        "scales of the gate for what it multiplies": ("warp < 2 ? 0 : call.outputs / 2", "0"),
        "rows of the next expert are stored": ("if (token >= tile.rows) continue;", ""),
        "rows of nobody are left": ("    clear_rows(", "    if (false) clear_rows("),
        "sums are read too early": ("    wgmma_wait<0>();\n    keep(part);\n", "    keep(part);\n"),
    },
    "grouped.cu": {
        "those who multiply are miscounted": ("mbar_init(&bars.free[i], 8)", "mbar_init(&bars.free[i], 4)"),
        "those who gather are miscounted": ("1 + 32 * GATHERERS", "1 + 16 * GATHERERS"),
        "half of the rows": ("part.row / 64 * 64 * 128", "0"),
        "the other half of the gate": ("half % 2 * (call.outputs / 2)", "0"),
        "scales of another row": ("min(part.row + 8 * h", "min(part.row"),
        "scales of the gate for what it multiplies": ("h * (call.outputs / 2)", "0"),
        "rows of the next expert are stored": ("first + r < tile.rows && ", ""),
        "a wait for copies is missing": (
            '    mbar_wait(&bars.full[s], (step / STAGES) & 1, "multiply: full");\n',
            "",
        ),
    },
    "experts.h": {
        "tiles begin elsewhere": ("tile.row = begin[i] + local % down * high", "tile.row = begin[i]"),
        "the swizzle is another": ("(lane % 8 ^ row & 7) * 16", "(lane % 8) * 16"),
        "the token of an entry": ("order[entry] / max(TOP_K, 1)", "order[entry]"),
        "the gate is not rounded": ("  unpack2(up, u);\n", "  unpack2(gate, u);\n"),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "fault"), [(file, fault) for file, faults in FAULTS.items() for fault in faults]
)
def test_planted_faults_are_caught(file: str, fault: str, tmp_path: Path) -> None:
    """A wrong line makes a wrong number, a NaN, or a report of a deadlock."""
    for name in FILES:
        (tmp_path / name).write_text((nvrtc.FOLDER / name).read_text())
    before, after = FAULTS[file][fault]
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after))
    emulator = Emulator(tmp_path, tmp_path)
    tile = MANY[1] if file == "grouped.cu" else FEW[0]
    shape = (150, 2, 2, 256, 1024) if file == "grouped.cu" else (23, 3, 2, 256, 1024)

    def right(seed: int) -> bool:
        try:
            check(
                emulator, "grouped_silu_mul", "spread", shape, tile, gathered=False, seed=seed, scales="block"
            )
        except (AssertionError, RuntimeError):
            return False
        return True

    assert not all(right(seed) for seed in (4, 5))
