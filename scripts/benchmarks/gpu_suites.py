"""The suites that need a GPU; those of kernels alone import torch, the others run a plan without it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from makeready.engine.entrypoints.options import UsageError

if TYPE_CHECKING:
    from benchmarks.suites import Bench

Measured: TypeAlias = "tuple[dict[str, Any], list[str]]"


def buckets(bench: Bench) -> Measured:
    """Full steps of every bucket and their parts; see :mod:`benchmarks.gpu_buckets`."""
    from benchmarks import gpu_buckets
    from makeready.graphs.executable.cuda import CudaExecutable

    executable, context = bench.llm.engine.executable, bench.job.latency.context
    if not isinstance(executable, CudaExecutable):
        raise UsageError("suite buckets times graphs on a GPU; give plan=FOLDER with a plan for one")
    found = gpu_buckets.buckets(executable, context=context, repeats=bench.job.repeats)
    return {"buckets": {"context": context, "steps": found}}, gpu_buckets.table(found)


def load(bench: Bench) -> Measured:
    """New processes up to the first step; see :mod:`benchmarks.gpu_start`."""
    from benchmarks import gpu_start

    job = bench.job
    if job.plan.path is None:
        raise UsageError("suite load reads a compiled plan in every process; give plan=FOLDER")
    plan, checkpoint = Path(job.plan.path).expanduser(), str(job.checkpoint)
    source = checkpoint if checkpoint == "dummy" else str(bench.checkpoint)
    found = gpu_start.start(plan, source, job.model, repeats=job.repeats)
    return {"load": found}, gpu_start.table(found)


def gemm(bench: Bench) -> Measured:
    """The planner's choices of projections; see :mod:`benchmarks.gpu_gemm`."""
    _find_launcher()
    from benchmarks import gpu_gemm

    found = gpu_gemm.gemm()
    return {"gemm": found}, gpu_gemm.gemm_table(found)


def gemm_sweep(bench: Bench) -> Measured:
    """Every way to cut projections; see :mod:`benchmarks.gpu_gemm`."""
    _find_launcher()
    from benchmarks import gpu_gemm

    found = gpu_gemm.gemm_sweep()
    return {"gemm_sweep": found}, gpu_gemm.sweep_table(found)


def small_ops(bench: Bench) -> Measured:
    """Norms, activations, embeddings, sampling; see :mod:`benchmarks.gpu_small_ops`."""
    _find_launcher()
    from benchmarks import gpu_small_ops

    found = gpu_small_ops.small_ops()
    return {"small_ops": found}, gpu_small_ops.table(found)


def _find_launcher() -> None:
    """What runs single kernels on a GPU is shared with their tests.

    Raises:
        UsageError: PyTorch sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UsageError("suites of single kernels run them through PyTorch, which sees no GPU here")
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "gpu"))


GPU_SUITES = {
    "buckets": buckets,
    "load": load,
    "gemm": gemm,
    "gemm_sweep": gemm_sweep,
    "small_ops": small_ops,
}
