"""Dense projections of Qwen3-8B on the present GPU, beside their floors and cuBLAS.

``gemm`` times what the planner would choose; ``gemm_sweep`` every way worth a try, which the cost model was
fitted to (kernels/gemm/linear_cost.py). Weights rotate over enough copies that none is left in L2 when its turn
comes again, and activations are followed by rows that maps may reach, as in a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import launcher, rates
from benchmarks.gpu.shapes import HIDDEN, MATRICES, SPARE, VOCABULARY, copies
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_cost import seconds, tilings
from makeready.kernels.gemm.linear_triton import candidates, describe, linear_cuda

assert isinstance(linear, Contract)

ROTATED = 400e6  # bytes of weights that calls rotate over
HEAD = {"lm_head": (VOCABULARY, HIDDEN)}
ROWS = (1, 4, 16, 64, 128, 192, 256, 512, 1024, 4096, 8192)
SWEPT = (1, 16, 32, 64, 96, 128, 160, 192, 256, 384, 512, 1024, 2048, 8192)
LOGITS = (1, 16, 64, 128, 192, 256)  # the last projection runs for rows, not for tokens
MOST = 60  # ways of a product that a sweep tries
WRONG = 1e-2  # relative error from which a result is no rounding


@dataclass(frozen=True)
class Product:
    """A projection at ``T`` tokens, ``lm_head`` in fp32."""

    name: str
    T: int
    N: int
    K: int

    @property
    def attrs(self) -> dict[str, Any]:
        """Of the contract."""
        return {"out_dtype": "float32"} if self.name in HEAD else {}

    @property
    def floor(self) -> float:
        """Seconds that no way beats: all bytes once, or all operations."""
        out = 4 if self.name in HEAD else 2  # bytes of a value
        nbytes = 2 * (self.N + self.T) * self.K + out * self.T * self.N
        return rates.present().floor(nbytes, 2 * self.T * self.N * self.K)

    def call(self, device: str) -> tuple[OpCall, torch.Tensor]:
        """The call, and its activations; on device meta without memory."""
        x = torch.randn(self.T + SPARE, self.K, device=device, dtype=torch.bfloat16)[: self.T]
        weight = torch.empty(self.N, self.K, dtype=torch.bfloat16, device=device)
        return launcher.op_call(linear, {"x": x, "weight": weight}, self.attrs, spare=True), x


def products(*, sweep: bool) -> list[Product]:
    """Every projection at its numbers of rows."""
    groups = ((MATRICES, SWEPT if sweep else ROWS), (HEAD, LOGITS))
    return [
        Product(name, T, N, K) for matrices, rows in groups for name, (N, K) in matrices.items() for T in rows
    ]


def calls(*, sweep: bool) -> Iterator[tuple[OpCall, Sequence[Candidate]]]:
    """What is going to run, without operands."""
    for product in products(sweep=sweep):
        call, _ = product.call("meta")
        yield call, _worth_a_try(call) if sweep else linear_cuda(call)


def gemm() -> list[dict[str, Any]]:
    """The planner's choice, its other candidates and cuBLAS, in seconds, and the ways whose results are wrong."""
    found = []
    for product, call, sets, ways in _work(linear_cuda, sweep=False):
        wrong = _wrong(call, sets, ways)
        times = {way.name: launcher.time(way, call, sets) for way in ways}
        found.append(
            {
                "matrix": product.name,
                "tokens": product.T,
                "floor": product.floor,
                "cublas": _cublas(sets),
                "chosen": ways[0].name,
                "candidates": times,
                "wrong": wrong,
            }
        )
    return found


def gemm_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every wrong result; a line a product: what was chosen beside the floor, cuBLAS and the best candidate."""
    lines = [f"WRONG {row['matrix']} {row['tokens']} {way}" for row in found for way in row["wrong"]]
    lines.append(
        "matrix   tokens  chosen                              µs  floor/µs  cuBLAS µs  best candidate"
    )
    for row in found:
        times, chosen = row["candidates"], row["chosen"]
        best = min(times, key=times.__getitem__)
        other = "" if best == chosen else f"{1e6 * times[best]:9.1f} {best}"
        lines.append(
            f"{row['matrix']:8} {row['tokens']:6}  {chosen:30} {1e6 * times[chosen]:8.1f}  "
            f"{row['floor'] / times[chosen]:8.2f}  {1e6 * row['cublas']:9.1f}  {other}"
        )
    return lines


def gemm_sweep() -> list[tuple[str, int, str, float, float, bool]]:
    """Matrix, tokens, way, seconds, the model's seconds and whether the result is wrong, of all ways worth it.

    The way ``cublas`` has the floor for its model's seconds.
    """
    found = []
    for product, call, sets, ways in _work(_worth_a_try, sweep=True):
        model = {way.name: seconds(describe(call), way) for way in tilings(describe(call))}
        wrong = _wrong(call, sets, ways)
        for way in ways:
            took = launcher.time(way, call, sets)
            found.append((product.name, product.T, way.name, took, model[way.name], way.name in wrong))
        found.append((product.name, product.T, "cublas", _cublas(sets), product.floor, False))
    return found


def sweep_table(found: Sequence[tuple[str, int, str, float, float, bool]]) -> list[str]:
    """A line a product: what the model would choose beside the four fastest; and every wrong result."""
    lines = [f"WRONG {name} {T} {way}" for name, T, way, _, _, wrong in found if wrong]
    for name, T in dict.fromkeys((row[0], row[1]) for row in found):
        rows = [row for row in found if row[:2] == (name, T)]
        (cublas,) = (row for row in rows if row[2] == "cublas")
        ours = sorted((row for row in rows if row[2] != "cublas"), key=lambda row: row[3])
        model = min(ours, key=lambda row: row[4])
        fastest = "  ".join(f"{1e6 * row[3]:.1f} {row[2]}" for row in ours[:4])
        lines.append(
            f"{name:8} {T:5} floor {1e6 * cublas[4]:.1f} cuBLAS {1e6 * cublas[3]:.1f} | the model's "
            f"{1e6 * model[3]:.1f} {model[2]} | {fastest}"
        )
    return lines


def _worth_a_try(call: OpCall) -> list[Candidate]:
    """Ways within twice the predicted best; where products take long and predictions hold, within 1.3 times."""
    product = describe(call)
    limit = 2.0 if product.T < 1024 else 1.3
    predicted = [seconds(product, way) for way in tilings(product)]
    ways = zip(candidates(call), predicted, strict=True)
    found = {way.name: way for way, took in ways if took < limit * predicted[0]}  # a way may be there twice
    return list(found.values())[:MOST]


def _work(
    ways_of: Callable[[OpCall], Sequence[Candidate]], *, sweep: bool
) -> Iterator[tuple[Product, OpCall, list[dict[str, torch.Tensor]], list[Candidate]]]:
    """Each product with its call, sets of operands and the ways that fit, all compiled beforehand."""
    launcher.prepare(calls(sweep=sweep))
    weights: list[torch.Tensor] = []
    for product in products(sweep=sweep):
        if not weights or weights[0].shape != (product.N, product.K):
            weights = [
                torch.randn(product.N, product.K, device="cuda", dtype=torch.bfloat16) * 0.02
                for _ in range(copies(2 * product.N * product.K, over=ROTATED))
            ]
        call, x = product.call("cuda")
        ways = [way for way in ways_of(call) if launcher.fits(way, call)]
        yield product, call, [{"x": x, "weight": weight} for weight in weights], ways


def _wrong(call: OpCall, sets: Sequence[Mapping[str, torch.Tensor]], ways: Sequence[Candidate]) -> list[str]:
    """The ways whose result is not that of a product in fp32."""
    want = sets[0]["x"].float() @ sets[0]["weight"].float().t()
    found = []
    for way in ways:
        got = launcher.run(way, call, sets[0])["y"].float()
        if not ((got - want).norm() / want.norm() < WRONG):
            found.append(way.name)
    return found


def _cublas(sets: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Seconds of one product through torch, from a graph over the same operands."""
    full = [{**s, "y": s["x"].new_empty(s["x"].shape[0], s["weight"].shape[0])} for s in sets]
    return launcher.time_each(lambda s: torch.mm(s["x"], s["weight"].t(), out=s["y"]), full)
