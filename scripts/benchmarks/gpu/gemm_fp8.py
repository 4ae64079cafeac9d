"""8-bit projections of Qwen3-8B on the present GPU, beside their floors and torch's ``_scaled_mm``, for integers its
``_int_mm``, which has no scales and gives int32.

``gemm_fp8`` times the planner's best choices; ``gemm_fp8_sweep`` every way worth a try, which the cost model was
fitted to (kernels/gemm/linear_fp8_tiling.py). Weights rotate over enough copies that none is left in L2 when its
turn comes again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import launcher, rates
from benchmarks.gpu.shapes import MATRICES, SPARE, copies
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.linear_fp8 import linear_fp8, linear_fp8_block
from makeready.kernels.gemm.linear_fp8_tiling import seconds, tilings
from makeready.kernels.gemm.linear_fp8_triton import describe, emit
from makeready.kernels.gemm.linear_int8 import linear_int8

ROTATED = 400e6  # bytes of weights that calls rotate over
ROWS_SCALED, GROUPS_SCALED, INTEGERS = KINDS = (
    "rows",
    "groups",
    "integers",
)  # floats by their scales; int8 by rows
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SWEPT = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)
WRONG = 6e-3  # relative error from which a result is no rounding

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        kinds: of KINDS.
        matrices: of MATRICES.
        rows: of activations.
        within: ways that are predicted to take up to this many times the best one's time are tried.
        most: of them.
    """

    kinds: Sequence[str]
    matrices: Sequence[str]
    rows: Sequence[int]
    within: float
    most: int


def wanted(kinds: Sequence[str], matrices: Sequence[str], *, sweep: bool) -> Wanted:
    """The planner's best, or every way worth a try."""
    return Wanted(kinds, matrices, SWEPT, 1.8, 20) if sweep else Wanted(kinds, matrices, ROWS, 1.2, 3)


def contract_of(kind: str) -> Contract:
    """With one scale a row, or with scales by groups of 128; of integers."""
    found = {ROWS_SCALED: linear_fp8, GROUPS_SCALED: linear_fp8_block, INTEGERS: linear_int8}[kind]
    assert isinstance(found, Contract)
    return found


def shapes(T: int, N: int, K: int, kind: str, *, bias: bool = False, device: str = "meta") -> Tensors:
    """Operands that hold nothing."""
    groups, dtype = K // 128, torch.int8 if kind == INTEGERS else torch.float8_e4m3fn
    scales = ((T, groups), (-(-N // 128), groups)) if kind == GROUPS_SCALED else ((T, 1), (N,))
    made = {"bias": torch.empty(N, dtype=torch.bfloat16, device=device)} if bias else {}
    return made | {
        "x": torch.empty(T, K, dtype=dtype, device=device),
        "weight": torch.empty(N, K, dtype=dtype, device=device),
        "x_scale": torch.empty(scales[0], device=device),
        "weight_scale": torch.empty(scales[1], device=device),
    }


def operands(
    T: int, N: int, K: int, kind: str, *, bias: bool = False, spare: bool = False, seed: int = 0
) -> Tensors:
    """Random operands whose scales differ by up to e^2, so that a misplaced one shows."""
    torch.manual_seed(seed + T)
    made = shapes(T, N, K, kind, bias=bias, device="cuda")
    for name in ("x", "weight"):
        numbers, dtype = torch.randn(made[name].shape, device="cuda") * 60, made[name].dtype
        made[name] = (numbers.round().clamp(-127, 127) if kind == INTEGERS else numbers.clamp(-448, 448)).to(
            dtype
        )
    for name in ("x_scale", "weight_scale"):
        made[name].uniform_(-2, 2).exp_().mul_(0.002)
    if spare:
        wide = torch.full((T + SPARE, K), 0x7F, dtype=torch.uint8, device="cuda").view(made["x"].dtype)
        wide[:T] = made["x"]
        made["x"] = wide[:T]
    if bias:
        made["bias"].normal_()
    return made


def floor(T: int, N: int, K: int, kind: str) -> float:
    """Seconds that no way to run it beats: all bytes once, or all operations."""
    dtype = "int8" if kind == INTEGERS else "float8_e4m3fn"
    return rates.present().floor(N * K + T * K + 2 * T * N, 2 * T * N * K, dtype)


def calls(wanted: Wanted) -> Iterator[tuple[OpCall, Sequence[Candidate]]]:
    """What is going to run, without operands."""
    for kind in wanted.kinds:
        for name in wanted.matrices:
            for T in wanted.rows:
                call = _call(shapes(T, *MATRICES[name], kind), kind)
                yield call, _ways(call, wanted)


def measure(wanted: Wanted, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Of each product: floor, torch's seconds, and of the ways tried, in the planner's order, seconds, seconds
    predicted and relative error.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    launcher.prepare(calls(wanted))
    found: list[dict[str, Any]] = []
    for kind in wanted.kinds:
        for name, T, sets, call in _work(wanted, kind):
            note(f"{kind} {name} {T}")
            other = _by_torch(sets, kind)
            found.append(
                {
                    "scales": kind,
                    "matrix": name,
                    "tokens": T,
                    "floor": floor(T, *MATRICES[name], kind),
                    "torch": None if math.isnan(other) else other,
                    "ways": _time(call, sets, wanted, kind),
                }
            )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every wrong result; a line a product: the first choice beside floor and torch, and the fastest ways."""
    lines = [
        f"WRONG {row['scales']} {row['matrix']} {row['tokens']} {name} is off by {way['error']:.1e}"
        for row in found
        for name, way in row["ways"].items()
        if not way["error"] < WRONG
    ]
    lines.append(
        "scales   matrix      T  chosen                              µs  TB/s TFLOP/s floor/µs torch µs   error"
        "  fastest"
    )
    for row in found:
        (N, K), T, ways = MATRICES[row["matrix"]], row["tokens"], row["ways"]
        chosen = next(iter(ways))
        took, other = ways[chosen]["seconds"], row["torch"]
        fastest = sorted(ways, key=lambda name: ways[name]["seconds"])[:3]
        lines.append(
            f"{row['scales']:8s} {row['matrix']:8s} {T:4d}  {chosen:32s} {took * 1e6:7.1f} "
            f"{N * K / took / 1e12:5.2f} {2 * T * N * K / took / 1e12:7.0f} {row['floor'] / took:8.2f} "
            f"{math.nan if other is None else other * 1e6:8.1f} {ways[chosen]['error']:7.1e}  "
            + "  ".join(f"{ways[name]['seconds'] * 1e6:.1f} {name}" for name in fastest)
        )
    return lines


def attributes(kind: str) -> dict[str, Any]:
    """Of the call, with bf16 results."""
    return {"out_dtype": "bfloat16", **({"block": 128} if kind == GROUPS_SCALED else {})}


def _call(tensors: Tensors, kind: str) -> OpCall:
    return launcher.op_call(contract_of(kind), tensors, attributes(kind), spare=True)


def _work(wanted: Wanted, kind: str) -> Iterator[tuple[str, int, list[Tensors], OpCall]]:
    for name in wanted.matrices:
        N, K = MATRICES[name]
        sets = [operands(1, N, K, kind, seed=i) for i in range(copies(N * K, over=ROTATED))]
        for T in wanted.rows:
            own = operands(T, 128, K, kind, spare=True)
            made = [{**s, "x": own["x"], "x_scale": own["x_scale"]} for s in sets]
            made = made if T <= 512 else made[:2]
            yield name, T, made, _call(made[0], kind)


def _ways(call: OpCall, wanted: Wanted) -> list[Candidate]:
    product = describe(call)
    ways = tilings(product)
    limit = wanted.within * seconds(product, ways[0])
    return [emit(call, way, product) for way in ways if seconds(product, way) < limit][: wanted.most]


def _time(call: OpCall, sets: Sequence[Tensors], wanted: Wanted, kind: str) -> dict[str, dict[str, float]]:
    product = describe(call)
    predicted = {way.name: seconds(product, way) for way in tilings(product)}
    wide = {k: v.float() for k, v in sets[0].items()}
    want = contract_of(kind).reference(**wide, **attributes(kind) | {"out_dtype": "float32"})
    made = {}
    for way in _ways(call, wanted):
        if launcher.fits(way, call):
            y = launcher.run(way, call, sets[0])["y"].float()
            made[way.name] = {
                "seconds": launcher.time(way, call, sets, reps=20 if product.T <= 1024 else 6),
                "predicted": predicted[way.name],
                "error": ((y - want).norm() / want.norm()).item(),
            }
    return made


def _by_torch(sets: Sequence[Tensors], kind: str) -> float:
    """Seconds of one product through torch with the same scales, of integers without; NaN where torch has none."""

    def product(s: Mapping[str, torch.Tensor]) -> None:
        if kind == INTEGERS:
            torch.ops.aten._int_mm.default(s["x"], s["weight"].t())
            return
        if kind == GROUPS_SCALED:
            scales = s["x_scale"].t().contiguous().t(), s["weight_scale"].t()
        else:
            scales = s["x_scale"], s["weight_scale"][None, :]
        torch._scaled_mm(s["x"], s["weight"].t(), *scales, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]

    try:
        return launcher.time_each(product, sets)
    except (RuntimeError, ValueError):
        return math.nan
