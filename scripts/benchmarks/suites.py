"""Every suite by name: it measures, and says what it found as JSON and as lines of text.

A suite's modules are imported when it runs: those that compare with transformers need torch, those that run
a plan on a GPU do without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.gpu.suites import GPU_SUITES
from makeready.engine.entrypoints.bench_options import BenchJob
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.entrypoints.scheduler_options import scheduler_options
from makeready.engine.entrypoints.status import Stages

if TYPE_CHECKING:
    from benchmarks.serve import Served
    from benchmarks.workloads import Work
    from makeready.engine.llm import LLM
    from makeready.engine.trace import StepTrace

Measured: TypeAlias = "tuple[dict[str, Any], list[str]]"


class Bench:
    """What suites share: options, one loaded model, one trace of its steps."""

    def __init__(self, job: BenchJob, stages: Stages) -> None:
        self.job = job
        self.stages = stages

    @cached_property
    def checkpoint(self) -> Path:
        """The checkpoint's file or folder."""
        assert self.job.checkpoint is not None
        return Path(self.job.checkpoint).expanduser()

    @cached_property
    def llm(self) -> LLM:
        """The model under ``plan=``, or under the plan that the options ask for."""
        from makeready.engine.llm import LLM
        from makeready.graphs import artifact

        job, path = self.job, self.job.plan.path
        plan = None if path is None else artifact.load(Path(path).expanduser())
        target = job.target if plan is None else plan.target
        if target == "cpu":
            self.use_threads()
        elif job.threads is not None:
            raise UsageError(f"threads={job.threads} is for PyTorch, which target {target} does without")
        return LLM(
            job.open(),
            plan,
            kv_memory_gib=job.kv.memory_gib,
            scheduler=scheduler_options(job.scheduler),
            progress=lambda done, total: self.stages.note(f"{done} of {total} weights"),
            **(job.plan_fields() if plan is None else {}),
        )

    def serve(self, works: Sequence[Work], **scheduler: Any) -> Served:
        """Run a load on a fresh engine with nothing cached, after a few tokens: first calls allocate.

        Args:
            works: the load.
            scheduler: changes to the options under ``scheduler``.
        """
        from benchmarks import serve
        from benchmarks.workloads import Work
        from makeready.engine.loop import Engine

        executable = self.llm.engine.executable
        options = replace(self.llm.engine.scheduler.options, **scheduler)
        serve.serve(Engine(executable, options), serve.requests_of(self.llm, [Work([0], 4)]))
        load = serve.requests_of(self.llm, works)
        trace = self.step_trace
        return serve.serve(Engine(executable, options), load, self.stages.note, trace and trace.step)

    @cached_property
    def step_trace(self) -> StepTrace | None:
        """The file of ``trace=``."""
        from makeready.engine.trace import StepTrace

        return None if self.job.trace is None else StepTrace(Path(self.job.trace).expanduser())

    def close(self) -> None:
        """End the step trace."""
        if self.step_trace is not None:
            self.step_trace.close()

    def recorded(self, speed: float) -> list[Work]:
        """The recorded load of ``replay.trace=``, so many times as fast."""
        from benchmarks import workloads

        options = self.job.replay
        assert options.trace is not None
        rows = workloads.read_trace(Path(options.trace).expanduser(), options.requests, options.block)
        vocabulary = self.llm.plan.config["vocab_size"]
        return workloads.replayed(rows, vocabulary, block=options.block, speed=speed, seed=options.seed)

    def use_threads(self) -> int:
        """Let PyTorch use ``threads`` threads; returns how many those are."""
        import torch

        torch.set_num_threads(self.job.threads or os.cpu_count() or 1)
        return torch.get_num_threads()


def decode(bench: Bench) -> Measured:
    """See :mod:`benchmarks.decode`."""
    from benchmarks import decode

    job, threads = bench.job, bench.use_threads()
    found = decode.decode(
        bench.checkpoint,
        rows=job.rows,
        tokens=job.tokens,
        repeats=job.repeats,
        weight_dtype=job.weight_dtype,
    )
    return {"threads": threads, **found}, decode.table(found)


def startup(bench: Bench) -> Measured:
    """See :mod:`benchmarks.startup`."""
    from benchmarks import startup

    job, threads = bench.job, bench.use_threads()
    found = startup.startup(bench.checkpoint, repeats=job.repeats, weight_dtype=job.weight_dtype)
    return {"threads": threads, **found}, startup.table(found)


def latency(bench: Bench) -> Measured:
    """See :mod:`benchmarks.latency`."""
    from benchmarks import latency

    job = bench.job
    found = latency.latency(
        bench.llm,
        rows=job.rows,
        context=job.latency.context,
        tokens=job.tokens,
        prompts=job.latency.prompts,
        repeats=job.repeats,
    )
    return {"latency": found}, latency.table(found)


def throughput(bench: Bench) -> Measured:
    """Random prompts, all there from the start; see :mod:`benchmarks.serve`."""
    from benchmarks import serve, steps, workloads

    options = asdict(bench.job.throughput)
    served = bench.serve(workloads.random_prompts(bench.llm.plan.config["vocab_size"], **options))
    found = serve.throughput(served) | {"steps": steps.step_figures(served.records)}
    return {"throughput": options | found}, serve.lines("offline", found)


def replay(bench: Bench) -> Measured:
    """A recorded load at its own arrival times; see :mod:`benchmarks.serve`."""
    from benchmarks import serve, steps

    options = asdict(bench.job.replay)
    served = bench.serve(bench.recorded(bench.job.replay.speed))
    found = serve.throughput(served) | serve.latencies(served)
    found["steps"] = steps.step_figures(served.records)
    return {"replay": options | found}, serve.lines(f"replay, {options['speed']:g} times as fast", found)


def prefix(bench: Bench) -> Measured:
    """The same prompts, all there from the start, with the prefix cache on and off."""
    from benchmarks import serve, workloads

    recorded = bench.job.replay.trace is not None
    options = asdict(bench.job.replay if recorded else bench.job.prefix)
    if recorded:
        works = [replace(work, arrival=0.0) for work in bench.recorded(1.0)]
    else:
        works = workloads.shared_prefixes(bench.llm.plan.config["vocab_size"], **options)
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name, changes in (("on", {}), ("off", {"prefix_cache": False})):
        found[name] = serve.throughput(bench.serve(works, **changes))
        lines += serve.lines(f"prefix cache {name}", found[name])
    found["gain"] = found["on"]["total_throughput"] / found["off"]["total_throughput"]
    return {"prefix": options | found}, [*lines, f"  {found['gain']:.2f} times as fast with it"]


def host(bench: Bench) -> Measured:
    """See :mod:`benchmarks.host_cost`."""
    from benchmarks import host_cost

    found = host_cost.host_cost(scheduler_options(bench.job.scheduler), **asdict(bench.job.host))
    return {"host": {"context": bench.job.host.context, "steps": found}}, host_cost.table(found)


SUITES: dict[str, Callable[[Bench], Measured]] = {
    "decode": decode,
    "startup": startup,
    "latency": latency,
    "throughput": throughput,
    "replay": replay,
    "prefix": prefix,
    "host": host,
    **GPU_SUITES,
}
