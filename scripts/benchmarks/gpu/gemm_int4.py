"""Projections of Qwen3-8B with 4-bit weights on the present GPU, beside their floors and 16-bit weights.

``gemm_int4`` times the planner's best choices, ``gemm_int4_sweep`` every way worth a try, for the cost model
(kernels/gemm/linear_int_tiling.py). Groups of 128, symmetric, and with zeros at few rows. Weights rotate over enough
copies that none is left in L2 when its turn comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import launcher, rates
from benchmarks.gpu.shapes import MATRICES, SPARE, copies
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_int import linear_int
from makeready.kernels.gemm.linear_int_tiling import seconds, tilings
from makeready.kernels.gemm.linear_int_triton import describe, emit
from makeready.kernels.gemm.linear_triton import linear_cuda
from makeready.kernels.integers import values

assert isinstance(linear, Contract)
assert isinstance(linear_int, Contract)

ROTATED = 400e6  # bytes of weights that calls rotate over
BITS, GROUP = 4, 128
ROWS = (1, 4, 16, 64, 256, 1024, 8192)
SWEPT = (1, 2, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 8192)
WITH_ZEROS = (1, 16)  # rows at which zeros are tried, too
WRONG = 1e-2  # relative error from which a result is no rounding
ATTRS = {"bits": BITS, "group": GROUP}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Wanted:
    """Ways that are predicted to take up to ``within`` times the best one's time are tried, at most ``most``."""

    rows: Sequence[int]
    within: float
    most: int


def wanted(*, sweep: bool) -> Wanted:
    """The planner's best, or every way worth a try."""
    return Wanted(SWEPT, 2.0, 24) if sweep else Wanted(ROWS, 1.3, 4)


def operands(N: int, K: int, zeros: bool, device: str = "cuda", seed: int = 0) -> Tensors:
    """Random words, scales that make weights of the usual size, and zeros around the middle."""
    generator = torch.Generator(device).manual_seed(seed) if device != "meta" else None
    tiled = (-(-N // 64), -(-K // GROUP), 64)
    made = {
        "weight": torch.empty(N, -(-K // 128) * 8 * BITS, dtype=torch.int16, device=device),
        "weight_scale": torch.empty(tiled, dtype=torch.float16, device=device),
    }
    if zeros:
        made["weight_zero"] = torch.empty(tiled, dtype=torch.uint8, device=device)
    if generator is not None:
        made["weight"].random_(-(2**15), 2**15, generator=generator)
        made["weight_scale"].uniform_(0.002, 0.006, generator=generator)
        if zeros:
            made["weight_zero"].random_(5, 11, generator=generator)
    return made


def activations(T: int, K: int, device: str = "cuda") -> torch.Tensor:
    """Followed by rows of NaN that maps may reach."""
    wide = torch.full((T + SPARE, K), float("nan"), dtype=torch.bfloat16, device=device)
    wide[:T] = torch.randn(T, K, device=device)
    return wide[:T]


def call_of(tensors: Mapping[str, torch.Tensor]) -> OpCall:
    """The call, as a plan has it."""
    return launcher.op_call(linear_int, tensors, ATTRS, spare=True)


def cases(wanted: Wanted) -> Iterator[tuple[str, int, bool]]:
    """Matrix, rows, and whether there are zeros."""
    for name in MATRICES:
        for zeros in (False, True):
            for T in wanted.rows if not zeros else WITH_ZEROS:
                yield name, T, zeros


def calls(wanted: Wanted) -> Iterator[tuple[OpCall, Sequence[Candidate]]]:
    """What is going to run, without operands."""
    for name, T, zeros in cases(wanted):
        N, K = MATRICES[name]
        x = activations(T, K, "meta")
        call = call_of({"x": x, **operands(N, K, zeros, "meta")})
        yield call, _ways(call, wanted)
        if not zeros:
            wide = _wide_call(x, torch.empty(N, K, dtype=torch.bfloat16, device="meta"))
            yield wide, linear_cuda(wide)[:1]


def measure(note: Callable[[str], None], *, sweep: bool) -> list[dict[str, Any]]:
    """Of each product: floor, seconds with 16-bit weights, and of the ways tried, in the planner's order, seconds,
    seconds predicted and relative error.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    asked = wanted(sweep=sweep)
    launcher.prepare(calls(asked))
    found: list[dict[str, Any]] = []
    sets: list[Tensors] = []
    weights: list[torch.Tensor] = []
    last: tuple[str, bool] | None = None
    for name, T, zeros in cases(asked):
        note(f"{name} {T}{' zeros' if zeros else ''}")
        N, K = MATRICES[name]
        if last != (name, zeros):
            sets.clear()
            sets += [operands(N, K, zeros, seed=i) for i in range(copies(N * K * BITS / 8, over=ROTATED))]
            weights = [
                torch.randn(N, K, device="cuda").bfloat16() for _ in range(copies(2 * N * K, over=ROTATED))
            ]
            last = (name, zeros)
        x = activations(T, K)
        some = [{"x": x, **one} for one in (sets if T <= 512 else sets[:2])]
        found.append(
            {
                "matrix": name,
                "tokens": T,
                "zeros": zeros,
                "floor": _floor(call_of(some[0])),
                "wide": None if zeros else _wide_seconds(x, weights),
                "ways": _time(some, asked),
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every wrong result; a line a product: the first choice beside floor and 16-bit weights, and the fastest."""
    lines = [
        f"WRONG {row['matrix']} {row['tokens']} {name} is off by {way['error']:.1e}"
        for row in found
        for name, way in row["ways"].items()
        if not way["error"] < WRONG
    ]
    lines.append(
        "matrix      T zeros  chosen                            µs floor/µs bf16 µs bf16/µs  fastest"
    )
    for row in found:
        ways, wide = row["ways"], row["wide"]
        chosen = next(iter(ways))
        took = ways[chosen]["seconds"]
        fastest = sorted(ways, key=lambda name: ways[name]["seconds"])[:3]
        beside = f"{'':15}" if wide is None else f"{wide * 1e6:7.1f} {wide / took:7.2f}"
        lines.append(
            f"{row['matrix']:8s} {row['tokens']:4d} {'yes' if row['zeros'] else '':5s}  {chosen:28s} "
            f"{took * 1e6:7.1f} {row['floor'] / took:8.2f} {beside}  "
            + "  ".join(f"{ways[name]['seconds'] * 1e6:.1f} {name}" for name in fastest)
        )
    return lines


def _floor(call: OpCall) -> float:
    """Seconds that no way to run it beats: all bytes once, or all operations."""
    product = describe(call)
    return rates.present().floor(product.moved, 2 * product.T * product.N * product.K)


def _ways(call: OpCall, wanted: Wanted) -> list[Candidate]:
    product = describe(call)
    ways = tilings(product)
    limit = wanted.within * seconds(product, ways[0])
    return [emit(call, way, product) for way in ways if seconds(product, way) < limit][: wanted.most]


def _time(sets: Sequence[Tensors], wanted: Wanted) -> dict[str, dict[str, float]]:
    call = call_of(sets[0])
    product = describe(call)
    predicted = {way.name: seconds(product, way) for way in tilings(product)}
    first = sets[0]
    weights = values(
        first["weight"], first["weight_scale"], first.get("weight_zero"),
        bits=BITS, group=GROUP, inputs=product.K, dtype=torch.float32,
    )  # fmt: skip
    want = first["x"].float() @ weights.T
    made = {}
    for way in _ways(call, wanted):
        if launcher.fits(way, call):
            y = launcher.run(way, call, first)["y"].float()
            made[way.name] = {
                "seconds": launcher.time(way, call, sets, reps=20 if product.T <= 1024 else 6),
                "predicted": predicted[way.name],
                "error": ((y - want).norm() / want.norm()).item(),
            }
    return made


def _wide_call(x: torch.Tensor, weight: torch.Tensor) -> OpCall:
    return launcher.op_call(linear, {"x": x, "weight": weight}, spare=True)


def _wide_seconds(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> float:
    """Of the planner's choice for bf16 weights."""
    call = _wide_call(x, weights[0])
    sets = [{"x": x, "weight": weight} for weight in weights]
    return launcher.time(linear_cuda(call)[0], call, sets, reps=20 if len(x) <= 1024 else 6)
