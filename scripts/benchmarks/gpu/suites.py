"""The suites that need a GPU; those of kernels alone and the profiler of ``buckets`` import torch, others do not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench, Measured
from makeready.engine.entrypoints.options import UsageError


def buckets(bench: Bench) -> Measured:
    """Full steps of buckets and their parts; see :mod:`benchmarks.gpu.buckets`."""
    from benchmarks.gpu import buckets, steps_svg
    from makeready.graphs.executable.cuda.executable import CudaExecutable

    executable, context, options = bench.llm.engine.executable, bench.job.latency.context, bench.job.buckets
    if not isinstance(executable, CudaExecutable):
        raise UsageError("suite buckets times graphs on a GPU; give plan=FOLDER with a plan for one")
    known = [str(bucket) for bucket in executable.plan.buckets]
    only = known if options.only is None else options.only
    if not only or not set(only) <= set(known):
        raise UsageError(f"buckets.only={only} must list some of {', '.join(known)}")
    found = buckets.buckets(
        executable,
        only,
        context=context,
        repeats=bench.job.repeats,
        seconds=options.seconds,
        target=bench.floors_by(executable.plan),
    )
    if options.svg is not None:
        Path(options.svg).expanduser().write_text(steps_svg.picture(found) + "\n")
    return _with_rates(
        {"buckets": {"context": context, "seconds": options.seconds, "steps": found}}, buckets.table(found)
    )


def load(bench: Bench) -> Measured:
    """New processes up to the first step; see :mod:`benchmarks.gpu.start`."""
    from benchmarks.gpu import start

    job, plan = bench.job, _plan_for_gpu(bench, "load")
    checkpoint = str(job.checkpoint)
    source = checkpoint if checkpoint == "dummy" else str(bench.checkpoint)
    found = start.start(plan, source, job.model, repeats=job.repeats)
    return {"load": found}, start.table(found)


def load_steps(bench: Bench) -> Measured:
    """What loading consists of, and other settings of it; see :mod:`benchmarks.gpu.load_steps`."""
    from benchmarks.gpu import load_steps

    plan, folder = _plan_for_gpu(bench, "load_steps"), bench.job.load_steps.weights
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary if folder is None else folder).expanduser()
        found = load_steps.measure(plan, weights, bench.stages.note)
    return {"load_steps": found}, load_steps.table(found)


def gemm(bench: Bench) -> Measured:
    """The planner's choices of projections; see :mod:`benchmarks.gpu.gemm`."""
    _need_gpu("gemm")
    from benchmarks.gpu import gemm

    found = gemm.gemm()
    return _with_rates({"gemm": found}, gemm.gemm_table(found))


def gemm_sweep(bench: Bench) -> Measured:
    """Every way to cut projections; see :mod:`benchmarks.gpu.gemm`."""
    _need_gpu("gemm_sweep")
    from benchmarks.gpu import gemm

    found = gemm.gemm_sweep()
    return _with_rates({"gemm_sweep": found}, gemm.sweep_table(found))


def gemm_fp8(bench: Bench) -> Measured:
    """The planner's choices of 8-bit projections; see :mod:`benchmarks.gpu.gemm_fp8`."""
    return _gemm_fp8(bench, "gemm_fp8", sweep=False)


def gemm_fp8_sweep(bench: Bench) -> Measured:
    """Every way to cut 8-bit projections; see :mod:`benchmarks.gpu.gemm_fp8`."""
    return _gemm_fp8(bench, "gemm_fp8_sweep", sweep=True)


def _gemm_fp8(bench: Bench, name: str, *, sweep: bool) -> Measured:
    _need_gpu(name)
    from benchmarks.gpu import gemm_fp8

    options = bench.job.gemm_fp8
    wanted = gemm_fp8.wanted(options.scales, options.matrices, sweep=sweep)
    found = gemm_fp8.measure(wanted, bench.stages.note)
    return _with_rates({name: found}, gemm_fp8.table(found))


def gemm_int4(bench: Bench) -> Measured:
    """The planner's choices of projections with 4-bit weights; see :mod:`benchmarks.gpu.gemm_int4`."""
    return _gemm_int4("gemm_int4", bench, sweep=False)


def gemm_int4_sweep(bench: Bench) -> Measured:
    """Every way to cut projections with 4-bit weights; see :mod:`benchmarks.gpu.gemm_int4`."""
    return _gemm_int4("gemm_int4_sweep", bench, sweep=True)


def _gemm_int4(name: str, bench: Bench, *, sweep: bool) -> Measured:
    _need_gpu(name)
    from benchmarks.gpu import gemm_int4

    found = gemm_int4.measure(bench.stages.note, sweep=sweep)
    return _with_rates({name: found}, gemm_int4.table(found))


def gemm_few(bench: Bench) -> Measured:
    """Projections of few tokens; see :mod:`benchmarks.gpu.gemm_few`."""
    _need_gpu("gemm_few")
    from benchmarks.gpu import gemm_few

    options = bench.job.gemm_few
    found = gemm_few.measure(bench.stages.note, options.kinds, options.tokens)
    return _with_rates({"gemm_few": found}, gemm_few.table(found))


def attention(bench: Bench) -> Measured:
    """Attention as plans have it; see :mod:`benchmarks.gpu.attention`."""
    return _attention(bench, "attention", sweep=False)


def attention_sweep(bench: Bench) -> Measured:
    """More ways to cut attention; see :mod:`benchmarks.gpu.attention`."""
    return _attention(bench, "attention_sweep", sweep=True)


def _attention(bench: Bench, name: str, *, sweep: bool) -> Measured:
    _need_gpu(name)
    from benchmarks.gpu import attention

    found = attention.measure(bench.stages.note, bench.job.attention.parts, sweep=sweep)
    return _with_rates({name: found}, attention.table(found))


def small_ops(bench: Bench) -> Measured:
    """Norms, activations, embeddings; see :mod:`benchmarks.gpu.small_ops`."""
    _need_gpu("small_ops")
    from benchmarks.gpu import ops, small_ops

    found = small_ops.measure(bench.stages.note)
    return _with_rates({"small_ops": found}, ops.table(found))


def quantize_fp8(bench: Bench) -> Measured:
    """Quantization of activations and of weights; see :mod:`benchmarks.gpu.quantize_fp8`."""
    _need_gpu("quantize_fp8")
    from benchmarks.gpu import ops, quantize_fp8

    found = quantize_fp8.measure(bench.stages.note)
    return _with_rates({"quantize_fp8": found}, ops.table(found))


def sample(bench: Bench) -> Measured:
    """Sampling and log-probabilities; see :mod:`benchmarks.gpu.sample`."""
    _need_gpu("sample")
    from benchmarks.gpu import ops, sample

    found = sample.measure(bench.stages.note)
    return _with_rates({"sample": found}, ops.table(found))


def moe(bench: Bench) -> Measured:
    """A layer of experts and its ops; see :mod:`benchmarks.gpu.moe`."""
    _need_gpu("moe")
    from benchmarks.gpu import moe

    found = moe.measure(bench.stages.note)
    return _with_rates({"moe": found}, moe.table(found))


def _with_rates(found: dict[str, Any], lines: list[str]) -> Measured:
    """A suite's result with what its floors were computed from."""
    from benchmarks.gpu import rates

    measured = rates.present()
    return {"rates": measured.record(), **found}, [measured.line(), *lines]


def _plan_for_gpu(bench: Bench, suite: str) -> Path:
    """The folder of ``plan=``.

    Raises:
        UsageError: there is none.
        PlanError: the driver finds no GPU.
    """
    from makeready.graphs.executable.cuda.driver import Driver

    if bench.job.plan.path is None:
        raise UsageError(f"suite {suite} reads a compiled plan in every process; give plan=FOLDER")
    Driver().initialise()
    return Path(bench.job.plan.path).expanduser()


def _need_gpu(suite: str) -> None:
    """Kernels alone are launched through PyTorch.

    Raises:
        UsageError: it sees no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"suite {suite} runs kernels through PyTorch, which sees no GPU here; run it on one")


GPU_SUITES = {
    "buckets": buckets,
    "load": load,
    "load_steps": load_steps,
    "gemm": gemm,
    "gemm_sweep": gemm_sweep,
    "gemm_fp8": gemm_fp8,
    "gemm_fp8_sweep": gemm_fp8_sweep,
    "gemm_int4": gemm_int4,
    "gemm_int4_sweep": gemm_int4_sweep,
    "gemm_few": gemm_few,
    "attention": attention,
    "attention_sweep": attention_sweep,
    "small_ops": small_ops,
    "quantize_fp8": quantize_fp8,
    "sample": sample,
    "moe": moe,
}
