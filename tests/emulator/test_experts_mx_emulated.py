"""Products with experts' weights in MXFP4 in CUDA C++, emulated on the CPU, against the contracts in float64.

Rows of x of no entry, the scales of experts that nobody goes to, columns between rows of a wider buffer, and results
are NaN, and what fills words up to whole spans is random. Whatever was read without being an entry's, or not written,
shows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated import Emulator, needs_compiler, op_call
from moe_mx_operands import GATES, operands

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.moe.grouped_few_mx_cuda import TILES, applies, candidate

pytestmark = [needs_compiler, pytest.mark.slow]
OWN = ("fp4.h", "grouped_few_mx.cu")  # where faults are planted
FILES = ("hopper.h", "wgmma.h", "experts.h", *OWN)
ERROR = {"grouped_linear_mx": 3e-3, "grouped_silu_mul_mx": 1e-2, "grouped_clamped_swiglu_mx": 1e-2}
SMALL = (9, 5, 2, 128, 320)  # tokens, experts, k, outputs, inputs


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What is compiled once serves all tests."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


def check(
    emulator: Emulator, op: str, kind: str, shape: tuple[int, ...], tile: int, *, gathered: bool,
    bias: bool = False, least: int = 0, seed: int = 0, grid: int = 2,
) -> None:  # fmt: skip
    tensors = operands(kind, shape, gathered=gathered, bias=bias, least=least, seed=seed)
    attrs = {"top_k": 0 if gathered else shape[2], "out_dtype": "bfloat16", **GATES.get(op, {})}
    call = op_call(op, tensors, attrs, multiprocessors=grid)
    assert applies(call)
    way = candidate(call, tile)
    y = emulator.run(way, call, tensors, seed=seed, grid=min(grid, way.launches[0].grid[0]))["y"]
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    want = CONTRACTS[op].reference(**{"weight_global_scale": None} | wide, **attrs | {"out_dtype": "float64"})
    assert not want.isnan().any()
    assert not y[int(tensors["start"][-1]) :].any(), "rows of nobody are not zeros"
    off = float((y.double() - want).norm() / want.norm().clamp_min(1e-300))
    assert off < ERROR[op], (op, kind, off)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("gathered", [False, True])
def test_products(emulator: Emulator, tile: int, gathered: bool) -> None:
    for seed, kind in enumerate(("spread", "one", "none", "nobody", "single") if tile == 8 else ("spread",)):
        check(
            emulator,
            "grouped_linear_mx",
            kind,
            SMALL,
            tile,
            gathered=gathered,
            bias=bool(seed % 2),
            seed=seed,
        )


@pytest.mark.parametrize("op", [op for op in ERROR if op != "grouped_linear_mx"])
def test_gates(emulator: Emulator, op: str) -> None:
    clamped = op == "grouped_clamped_swiglu_mx"
    for seed, (tile, gathered) in enumerate(((8, False), (16, True), (32, False))):
        check(
            emulator,
            op,
            "spread",
            (20, 3, 2, 256, 448),
            tile,
            gathered=gathered,
            bias=clamped,
            least=6,
            seed=seed,
        )


def test_a_last_tile_of_one_half_and_blocks_that_end_a_span_early(emulator: Emulator) -> None:
    check(emulator, "grouped_linear_mx", "spread", (9, 3, 2, 192, 64), 8, gathered=False, bias=True)
    check(emulator, "grouped_linear_mx", "spread", (9, 3, 2, 64, 1984), 16, gathered=False, grid=1)


@pytest.mark.parametrize("least", [-109, 26, 106])
def test_scales_far_from_one(emulator: Emulator, least: int) -> None:
    """From 2^-127, with which half a unit is below what bfloat16 has as normal numbers, to above 2^64."""
    check(emulator, "grouped_linear_mx", "spread", SMALL, 8, gathered=False, least=least)


def test_a_scale_that_is_nan_spoils_its_outputs_alone(emulator: Emulator) -> None:
    tensors = operands("spread", SMALL, gathered=False, bias=False)
    tensors["weight_scale"][:, 0, 3, 5] = 255  # output 5, the fourth block
    attrs = {"top_k": 2, "out_dtype": "bfloat16"}
    call = op_call("grouped_linear_mx", tensors, attrs, multiprocessors=2)
    y = emulator.run(candidate(call, 8), call, tensors)["y"]
    entries = int(tensors["start"][-1])
    assert y[:entries, 5].isnan().all()
    assert not y[:entries, torch.arange(y.shape[1]) != 5].isnan().any()


FAULTS = {
    "an mbarrier is not arrived at": ("      if (lane == 0) mbar_arrive(&bars.tile_free[slot]);\n", ""),
    "bytes are miscounted": ("halves * (W_HALF + scales)", "halves * W_HALF"),
    "a wait for free places is missing": (
        '        mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "feed: free");\n',
        "",
    ),
    "rows come before their place is free": (
        '      mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "gather: free");\n',
        "",
    ),
    "rows are announced before they are there": ("mbar_arrive_after_copies", "mbar_arrive"),
    "the other half of the gate": ("half * (call.outputs / 2) :", "0 :"),
    "scales of another block": ("scales[block * ROWS + 8 * r]", "scales[8 * r]"),
    "scales of another row": ("scales[block * ROWS + 8 * r]", "scales[block * ROWS]"),
    "large scales of another block": ("scales[pair * ROWS]", "scales[0]"),
    "large scales of another row": ("scales[pair * ROWS + 8]", "scales[pair * ROWS]"),
    "a large scale is not seen": ("(beyond & 0x8000u) != 0", "false"),
    "the sign is lost": ("(sign & 0x80008000u) | ", ""),
    "a mantissa is lost": ("0x01c001c0u", "0x01800180u"),
    "what lies beyond the inputs is multiplied": ("if (4 * span + pair >= left) continue;", ""),
    "rows of the next expert are stored": ("token >= tile.rows || ", ""),
    "rows of nobody are left": ("    clear_rows(", "    if (false) clear_rows("),
    "what a tile's other half has is read too early": (
        "  named_sync(1, WORKERS);\n  int column",
        "  int column",
    ),
    "a limit is not kept": ("g[j] > most ? most : g[j]", "g[j]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    """A wrong line makes a wrong number, a NaN, or a report of a deadlock, with scales that are large or not."""
    texts = {name: (nvrtc.FOLDER / name).read_text() for name in FILES}
    before, after = FAULTS[fault]
    (place,) = (name for name in OWN if before in texts[name])
    texts[place] = texts[place].replace(before, after)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    emulator = Emulator(tmp_path, tmp_path)

    def right(seed: int) -> bool:
        try:
            check(
                emulator, "grouped_clamped_swiglu_mx", "spread", (23, 3, 2, 256, 1344), 8, gathered=False,
                least=12 if seed == 4 else 0, seed=seed,
            )  # fmt: skip
        except (AssertionError, RuntimeError):
            return False
        return True

    assert not all(right(seed) for seed in (4, 5))
