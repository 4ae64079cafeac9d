"""Dense projections of Qwen3-8B on the present GPU, beside their floors and cuBLAS.

    python tests/gpu/bench_gemm.py           the planner's choices
    python tests/gpu/bench_gemm.py sweep     every way to cut each product, for the cost model; writes JSON

Weights rotate over enough copies that none is left in L2 when its turn comes again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import launcher

from makeready.graphs.cuda.aot import Compiled, Kernel, compile_kernel, kernel_of
from makeready.graphs.cuda.pool import compile_all
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.linear import linear
from makeready.kernels.gemm.linear_cost import seconds, tilings
from makeready.kernels.gemm.linear_triton import describe, emit, linear_cuda

assert isinstance(linear, Contract)

BANDWIDTH, RATE = 3.0e12, 779e12  # measured on an H100: device copy in bytes/s, bf16 product in operations/s
ROTATED = 400e6  # bytes of weights that calls rotate over; L2 has 50 MiB
MATRICES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
VOCABULARY = (151936, 4096)
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096, 8192)
SWEPT = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)

Sets = list[dict[str, torch.Tensor]]
_MADE: dict[Kernel, Compiled] = {}


def precompile(work: Iterable[tuple[OpCall, Sequence[Candidate]]]) -> None:
    """Compile what the launcher is about to need on all cores."""
    kernels = {kernel_of(launch, call, 90) for call, ways in work for way in ways for launch in way.launches}
    with tempfile.TemporaryDirectory() as folder:
        _MADE.update(compile_all(sorted(kernels, key=repr), Path(folder)))
    launcher.compile_kernel = lambda kernel: _MADE.get(kernel) or compile_kernel(kernel)


def operand_sets(N: int, K: int) -> list[torch.Tensor]:
    """Random weights [N, K], as many as :data:`ROTATED` asks for."""
    count = max(2, round(ROTATED / (2 * N * K) + 0.5))
    return [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(count)]


def floor(T: int, N: int, K: int) -> float:
    """Seconds that no way to run it beats: all bytes once, or all operations."""
    return max(2 * (N * K + T * K + T * N) / BANDWIDTH, 2 * T * N * K / RATE)


def cublas(sets: Sets) -> float:
    """Seconds of one product through torch, from a graph over the same operands."""
    outs = [s["x"].new_empty(s["x"].shape[0], s["weight"].shape[0]) for s in sets]
    rounds = -(-20 // len(sets))

    def calls() -> None:
        for _ in range(rounds):
            for s, y in zip(sets, outs, strict=True):
                torch.mm(s["x"], s["weight"].t(), out=y)

    return launcher.time_graph(calls) / (rounds * len(sets))


def _work(
    rows: Sequence[int], matrices: Mapping[str, tuple[int, int]]
) -> Iterable[tuple[str, int, Sets, OpCall]]:
    for name, (N, K) in matrices.items():
        weights = operand_sets(N, K)
        for T in rows:
            if VOCABULARY[0] == N and T > 256:
                continue
            x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
            sets: Sets = [{"x": x, "weight": w} for w in weights]
            attrs = {"out_dtype": "float32"} if VOCABULARY[0] == N else {}
            yield name, T, sets, launcher.op_call(linear, sets[0], attrs)


def _calls(rows: Sequence[int], matrices: Mapping[str, tuple[int, int]]) -> Iterable[OpCall]:
    """The same calls without their operands."""
    for N, K in matrices.values():
        weight = torch.empty(N, K, dtype=torch.bfloat16, device="meta")
        for T in rows:
            x = torch.empty(T, K, dtype=torch.bfloat16, device="meta")
            attrs = {"out_dtype": "float32"} if VOCABULARY[0] == N else {}
            yield launcher.op_call(linear, {"x": x, "weight": weight}, attrs)


def bench() -> None:
    """Print what the planner's first choice takes, and whether another of its candidates is faster."""
    matrices = {**MATRICES, "lm_head": VOCABULARY}
    precompile((call, linear_cuda(call)) for call in _calls(ROWS, matrices))
    print(
        "matrix      T  chosen                              µs  TB/s  TFLOP/s  floor/µs  cuBLAS µs  best candidate"
    )
    for name, T, sets, call in _work(ROWS, matrices):
        N, K = call.dims["N"], call.dims["K"]
        times = [(launcher.time(way, call, sets), way.name) for way in linear_cuda(call)]
        took, chosen = times[0]
        least, best = min(times)
        print(
            f"{name:8s} {T:4d}  {chosen:30s} {took * 1e6:7.1f}  {2 * N * K / took / 1e12:4.2f}  "
            f"{2 * T * N * K / took / 1e12:7.0f}  {floor(T, N, K) / took:8.2f}  {cublas(sets) * 1e6:9.1f}  "
            f"{least * 1e6:7.1f} {best if best != chosen else ''}",
            flush=True,
        )


def _swept(call: OpCall) -> list[Candidate]:
    """The ways that are worth a try: within twice the predicted best, 72 at most."""
    product = describe(call)
    ways = tilings(product)
    best = seconds(product, ways[0])
    return [emit(call, way, product) for way in ways if seconds(product, way) < 2 * best][:72]


def sweep() -> None:
    """Time all ways; print the fastest few a product and write all figures to ``$OUT/gemm_sweep.json``."""
    groups = ((SWEPT, MATRICES), ((1, 16, 64, 256), {"lm_head": VOCABULARY}))
    precompile((call, _swept(call)) for rows, matrices in groups for call in _calls(rows, matrices))
    rows_out = []
    for rows, matrices in groups:
        for name, T, sets, call in _work(rows, matrices):
            product = describe(call)
            model = {way.name: seconds(product, way) for way in tilings(product)}
            reference = cublas(sets)
            want = sets[0]["x"].float() @ sets[0]["weight"].float().t()
            times = []
            for way in _swept(call):
                try:
                    y = launcher.run(way, call, sets[0])["y"]
                except AssertionError:  # spills: the planner refuses it too
                    continue
                wrong = not ((y.float() - want).norm() / want.norm() < 1e-2)
                took = launcher.time(way, call, sets)
                times.append((took, way.name))
                rows_out.append([name, T, way.name, took, model[way.name], wrong])
                if wrong:
                    print("WRONG", name, T, way.name)
            first = times[0]
            times.sort()
            fastest = "  ".join(f"{t * 1e6:.1f} {n}" for t, n in times[:4])
            limit = floor(T, call.dims["N"], call.dims["K"])
            print(
                f"{name:8s} T={T:4d} floor {limit * 1e6:.1f} cuBLAS {reference * 1e6:.1f} | model's "
                f"{first[0] * 1e6:.1f} {first[1]} | {fastest}",
                flush=True,
            )
            rows_out.append([name, T, "cublas", reference, limit, False])
    Path(os.environ.get("OUT", "."), "gemm_sweep.json").write_text(json.dumps(rows_out))


if __name__ == "__main__":
    sweep() if "sweep" in sys.argv else bench()
