"""8-bit projections of Qwen3-8B on the present GPU, beside their floors and torch's ``_scaled_mm``.

    python tests/gpu/bench_gemm_fp8.py                     the planner's choices
    python tests/gpu/bench_gemm_fp8.py sweep               every way worth a try, for the cost model
    python tests/gpu/bench_gemm_fp8.py sweep groups down   those of one kind of scales, of one matrix

Both write JSON to the folder that OUT names, or here.

Weights rotate over enough copies that none is left in L2 when its turn comes again.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import launcher

from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.linear_fp8 import linear_fp8, linear_fp8_block
from makeready.kernels.gemm.linear_fp8_tiling import seconds, tilings
from makeready.kernels.gemm.linear_fp8_triton import describe, emit

BANDWIDTH, RATE = (
    3.0e12,
    1402e12,
)  # measured on an H100: device copy in bytes/s, 8-bit product in operations/s
ROTATED = 400e6  # bytes of weights that calls rotate over; L2 has 50 MiB
KINDS = {"rows": False, "groups": True}  # of scales, and whether they are grouped
MATRICES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096, 8192)
SWEPT = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)
_SPARE = 256  # rows beyond the last that maps may reach

Tensors = dict[str, torch.Tensor]


def contract_of(grouped: bool) -> Contract:
    """With one scale a row, or with scales by groups of 128."""
    found = linear_fp8_block if grouped else linear_fp8
    assert isinstance(found, Contract)
    return found


def shapes(T: int, N: int, K: int, grouped: bool, *, bias: bool = False, device: str = "meta") -> Tensors:
    """Operands that hold nothing."""
    groups = K // 128
    scales = ((T, groups), (-(-N // 128), groups)) if grouped else ((T, 1), (N,))
    made = {"bias": torch.empty(N, dtype=torch.bfloat16, device=device)} if bias else {}
    return made | {
        "x": torch.empty(T, K, dtype=torch.float8_e4m3fn, device=device),
        "weight": torch.empty(N, K, dtype=torch.float8_e4m3fn, device=device),
        "x_scale": torch.empty(scales[0], device=device),
        "weight_scale": torch.empty(scales[1], device=device),
    }


def operands(
    T: int, N: int, K: int, grouped: bool, *, bias: bool = False, spare: bool = False, seed: int = 0
) -> Tensors:
    """Random operands whose scales differ by up to e^2, so that a misplaced one shows."""
    torch.manual_seed(seed + T)
    made = shapes(T, N, K, grouped, bias=bias, device="cuda")
    for name in ("x", "weight"):
        made[name] = (
            (torch.randn(made[name].shape, device="cuda") * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
        )
    for name in ("x_scale", "weight_scale"):
        made[name].uniform_(-2, 2).exp_().mul_(0.002)
    if spare:
        wide = torch.full((T + _SPARE, K), 0x7F, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        wide[:T] = made["x"]
        made["x"] = wide[:T]
    if bias:
        made["bias"].normal_()
    return made


def floor(T: int, N: int, K: int) -> float:
    """Seconds that no way to run it beats: all bytes once, or all operations."""
    return max((N * K + T * K + 2 * T * N) / BANDWIDTH, 2 * T * N * K / RATE)


def scaled_mm(sets: Sequence[Tensors], grouped: bool) -> float:
    """Seconds of one product through torch with the same scales; NaN where torch has none."""
    rounds = -(-20 // len(sets))

    def calls() -> None:
        for _ in range(rounds):
            for s in sets:
                if grouped:
                    scales = s["x_scale"].t().contiguous().t(), s["weight_scale"].t()
                else:
                    scales = s["x_scale"], s["weight_scale"][None, :]
                torch._scaled_mm(s["x"], s["weight"].t(), *scales, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]

    try:
        return launcher.time_graph(calls) / (rounds * len(sets))
    except (RuntimeError, ValueError):
        return math.nan


def _attrs(grouped: bool) -> dict[str, object]:
    return {"out_dtype": "bfloat16", **({"block": 128} if grouped else {})}


def _work(
    rows: Sequence[int], grouped: bool, matrices: Sequence[str]
) -> Iterator[tuple[str, int, list[Tensors], OpCall]]:
    for name in matrices:
        N, K = MATRICES[name]
        copies = max(2, round(ROTATED / (N * K) + 0.5))
        sets = [operands(1, N, K, grouped, seed=i) for i in range(copies)]
        for T in rows:
            own = operands(T, 128, K, grouped, spare=True)
            made = [{**s, "x": own["x"], "x_scale": own["x_scale"]} for s in sets]
            made = made if T <= 512 else made[:2]
            yield name, T, made, launcher.op_call(contract_of(grouped), made[0], _attrs(grouped), spare=True)


def _calls(rows: Sequence[int], grouped: bool, matrices: Sequence[str]) -> Iterator[OpCall]:
    """The same calls without their operands."""
    for name in matrices:
        N, K = MATRICES[name]
        for T in rows:
            tensors = shapes(T, N, K, grouped)
            yield launcher.op_call(contract_of(grouped), tensors, _attrs(grouped), spare=True)


def _ways(call: OpCall, within: float, most: int) -> list[Candidate]:
    """The ways that are predicted to take up to ``within`` times the best one's time."""
    product = describe(call)
    ways = tilings(product)
    best = seconds(product, ways[0])
    return [emit(call, way, product) for way in ways if seconds(product, way) < within * best][:most]


@dataclass(frozen=True)
class Timed:
    """A way to run a product: seconds, seconds predicted, and its error against a product in fp32."""

    name: str
    took: float
    predicted: float
    error: float


def _time(call: OpCall, sets: Sequence[Tensors], within: float, most: int) -> list[Timed]:
    """The ways worth a try, the planner's order."""
    grouped = "block" in call.attrs
    product = describe(call)
    predicted = {way.name: seconds(product, way) for way in tilings(product)}
    wide = {k: v.float() for k, v in sets[0].items()}
    want = contract_of(grouped).reference(**wide, **_attrs(grouped) | {"out_dtype": "float32"})
    made = []
    for way in _ways(call, within, most):
        if launcher.fits(way, call):
            y = launcher.run(way, call, sets[0])["y"].float()
            error = ((y - want).norm() / want.norm()).item()
            took = launcher.time(way, call, sets, reps=20 if product.T <= 1024 else 6)
            made.append(Timed(way.name, took, predicted[way.name], error))
    return made


def measure(
    rows: Sequence[int], within: float, most: int, kinds: Sequence[str], matrices: Sequence[str]
) -> list[list[object]]:
    """Print the first choice beside the floor, torch, and the fastest of the ways tried.

    Args:
        within: ways that are predicted to take up to this many times the best one's time are tried.
        most: of them.
        kinds: of scales, of KINDS.

    Returns:
        Of each way: scales, matrix, rows, name, seconds, seconds predicted, relative error.
    """
    table: list[list[object]] = []
    launcher.prepare(
        (c, _ways(c, within, most)) for kind in kinds for c in _calls(rows, KINDS[kind], matrices)
    )
    print(
        "scales matrix      T  chosen                              µs  TB/s TFLOP/s floor/µs torch µs   error"
        "  fastest"
    )
    for kind in kinds:
        grouped = KINDS[kind]
        for name, T, sets, call in _work(rows, grouped, matrices):
            N, K = call.dims["N"], call.dims["K"]
            timed = _time(call, sets, within, most)
            other = scaled_mm(sets, grouped)
            table += [[kind, name, T, w.name, w.took, w.predicted, w.error] for w in timed]
            table.append([kind, name, T, "scaled_mm", other, floor(T, N, K), 0.0])
            for wrong in (w for w in timed if not w.error < 6e-3):
                print("WRONG", kind, name, T, wrong.name, wrong.error)
            took, fastest = timed[0].took, sorted(timed, key=lambda w: w.took)[:3]
            print(
                f"{kind:6s} {name:8s} {T:4d}  {timed[0].name:32s} {took * 1e6:7.1f} {N * K / took / 1e12:5.2f} "
                f"{2 * T * N * K / took / 1e12:7.0f} {floor(T, N, K) / took:8.2f} {other * 1e6:8.1f} "
                f"{timed[0].error:7.1e}  {'  '.join(f'{w.took * 1e6:.1f} {w.name}' for w in fastest)}",
                flush=True,
            )
    return table


def main() -> None:
    """Bench the planner's best, or sweep."""
    words = sys.argv[1:]
    if unknown := set(words) - {"sweep", *KINDS, *MATRICES}:
        sys.exit(f"{', '.join(sorted(unknown))}: give sweep, {', '.join((*KINDS, *MATRICES))}, or nothing.")
    sweep = "sweep" in words
    kinds = [k for k in KINDS if k in words] or list(KINDS)
    matrices = [m for m in MATRICES if m in words] or list(MATRICES)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, within, most = (SWEPT, 1.8, 20) if sweep else (ROWS, 1.2, 3)
    table = measure(rows, within, most, kinds, matrices)
    name = "gemm_fp8_sweep.json" if sweep else "gemm_fp8.json"
    Path(os.environ.get("OUT", "."), name).write_text(json.dumps(table))


if __name__ == "__main__":
    main()
