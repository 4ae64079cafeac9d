"""What suites share: options, one loaded model, one trace of its steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from makeready.engine.entrypoints.bench_options import BenchJob
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.entrypoints.scheduler_options import scheduler_options
from makeready.engine.entrypoints.status import Stages

if TYPE_CHECKING:
    from benchmarks.gpu.rates import Rates
    from benchmarks.serve import Served
    from benchmarks.workloads import Work
    from makeready.engine.llm import LLM
    from makeready.engine.trace import StepTrace
    from makeready.graphs.plan.plan import Plan
    from makeready.graphs.plan.targets import Target

Measured: TypeAlias = "tuple[dict[str, Any], list[str]]"  # what a suite found: for JSON, and as lines of text


class Bench:
    """Of one run of scripts/bench.py; what it has is made when a suite first asks for it."""

    def __init__(self, job: BenchJob, stages: Stages) -> None:
        self.job = job
        self.stages = stages
        self.rates: Rates | None = None  # measured before the model is loaded, for suites that have floors

    @cached_property
    def checkpoint(self) -> Path:
        """The checkpoint's file or folder."""
        assert self.job.checkpoint is not None
        return Path(self.job.checkpoint).expanduser()

    @cached_property
    def llm(self) -> LLM:
        """The model under ``plan=``, or under the plan that the options ask for."""
        from makeready.engine.llm import LLM
        from makeready.graphs.plan import artifact

        job, path = self.job, self.job.plan.path
        plan = None if path is None else artifact.load(Path(path).expanduser())
        target = job.target if plan is None else plan.target
        if target == "cpu":
            self.use_threads()
        elif job.threads is not None:
            raise UsageError(f"threads={job.threads} is for PyTorch, which target {target} does without")
        elif "latency" in job.suite or "buckets" in job.suite:
            self._measure()  # while there is memory: the cache takes what is free
        checkpoint = job.open()
        if job.constrained.tokenizer is not None:
            from benchmarks.constrained import speak

            speak(checkpoint, Path(job.constrained.tokenizer).expanduser())
        return LLM(
            checkpoint,
            plan,
            kv_memory_gib=job.kv.memory_gib,
            scheduler=scheduler_options(job.scheduler),
            progress=lambda done, total: self.stages.note(f"{done} of {total} weights"),
            report=self.stages.say,
            **(job.plan_fields() if plan is None else {}),
        )

    def _measure(self) -> None:
        """Measure what floors are computed from."""
        from benchmarks.gpu import rates

        self.stages.note("what the GPU sustains")
        self.rates = rates.present()

    def floors_by(self, plan: Plan) -> Target:
        """The plan's target with the figures that floors are computed from: measured ones where there are any."""
        from makeready.graphs.plan.targets import target_of

        target = target_of(plan)
        return target if self.rates is None else self.rates.on(target)

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
        serve.serve(Engine(executable, options), serve.replies_of(self.llm, [Work([0], 4)]))
        load = serve.replies_of(self.llm, works)
        trace = self.step_trace
        return serve.serve(Engine(executable, options), load, self.stages.note, trace and trace.step)

    @cached_property
    def step_trace(self) -> StepTrace | None:
        """The file of ``trace=``."""
        from makeready.engine.trace import StepTrace

        return None if self.job.trace is None else StepTrace(Path(self.job.trace).expanduser())

    def release(self) -> None:
        """Let go of the model, whose cache takes all memory that was free, for suites that load their own."""
        if "llm" in self.__dict__:
            self.llm.close()
            del self.llm

    def close(self) -> None:
        """Let go of the model and end the step trace."""
        self.release()
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
