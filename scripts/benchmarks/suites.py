"""Every suite by name: it measures, and says what it found as JSON and as lines of text.

A suite's modules are imported when it runs: those that compare with transformers need torch, those that run
a plan on a GPU do without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from makeready.engine.entrypoints.bench_options import BenchJob
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.entrypoints.status import Stages

if TYPE_CHECKING:
    from benchmarks.workloads import Work
    from makeready.engine.llm import LLM
    from makeready.engine.loop import Engine

Measured: TypeAlias = "tuple[dict[str, Any], list[str]]"


class Bench:
    """What suites share: options, and one loaded model."""

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
            progress=lambda done, total: self.stages.note(f"{done} of {total} weights"),
            **(job.plan_fields() if plan is None else {}),
        )

    def engine(self) -> Engine:
        """A fresh engine with nothing cached, after a few tokens on another one: first calls allocate."""
        from makeready.engine.loop import Engine
        from makeready.engine.sampling import SamplingParams

        executable = self.llm.engine.executable
        warm = Engine(executable)
        (request,) = self.llm.requests([0], SamplingParams(max_new_tokens=4, ignore_eos=True))
        warm.submit(request)
        while warm.busy:
            warm.step()
        return Engine(executable)

    def trace(self, speed: float) -> list[Work]:
        """The recorded load, so many times as fast."""
        from benchmarks import workloads

        options = self.job.replay
        assert options.trace is not None
        rows = workloads.read_trace(Path(options.trace).expanduser(), options.requests, options.block)
        vocabulary = self.llm.plan.config["vocab_size"]
        return workloads.replayed(rows, vocabulary, block=options.block, speed=speed, seed=options.seed)

    def note(self, detail: str) -> None:
        """Say how far the running suite is."""
        self.stages.note(detail)

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
    from benchmarks import serve, workloads

    llm = bench.llm
    works = workloads.random_prompts(llm.plan.config["vocab_size"], **asdict(bench.job.throughput))
    served = serve.serve(bench.engine(), serve.requests_of(llm, works), bench.note)
    found = serve.throughput(served)
    return {"throughput": {**asdict(bench.job.throughput), **found}}, serve.throughput_lines("offline", found)


def replay(bench: Bench) -> Measured:
    """A recorded load at its own arrival times; see :mod:`benchmarks.serve`."""
    from benchmarks import serve

    options = bench.job.replay
    served = serve.serve(bench.engine(), serve.requests_of(bench.llm, bench.trace(options.speed)), bench.note)
    found = {**serve.throughput(served), **serve.latencies(served)}
    lines = [
        *serve.throughput_lines(f"replay, {options.speed:g} times as fast", found),
        *serve.latency_lines(found),
    ]
    return {"replay": {**asdict(options), **found}}, lines


def host(bench: Bench) -> Measured:
    """See :mod:`benchmarks.host_cost`."""
    from benchmarks import host_cost

    found = host_cost.host_cost(**asdict(bench.job.host))
    return {"host": {"context": bench.job.host.context, "steps": found}}, host_cost.table(found)


SUITES: dict[str, Callable[[Bench], Measured]] = {
    "decode": decode,
    "startup": startup,
    "latency": latency,
    "throughput": throughput,
    "replay": replay,
    "host": host,
}
