"""Every suite by name: it measures, and says what it found as JSON and as lines of text.

A suite's modules are imported when it runs: those that compare with transformers need torch, those that run
a plan on a GPU do without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from makeready.engine.entrypoints.bench_options import BenchJob
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.entrypoints.status import Stages

if TYPE_CHECKING:
    from makeready.engine.llm import LLM

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


SUITES: dict[str, Callable[[Bench], Measured]] = {"decode": decode, "startup": startup, "latency": latency}
