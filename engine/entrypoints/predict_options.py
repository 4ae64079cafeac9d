"""What scripts/predict.py can be told; see engine/entrypoints/options.py."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from makeready.engine.entrypoints.bench_options import ReplayOptions, ThroughputOptions
from makeready.engine.entrypoints.options import Job, PlanOrPath, UsageError, check_compiled, literal
from makeready.engine.entrypoints.scheduler_options import SchedulerSettings, scheduler_options


@dataclass
class AloneOptions:
    """The time between tokens and to the first one.

    Attributes:
        context: tokens of context a row for the time between tokens. null: 1,024, or what the plan allows.
        prompts: lengths of single prompts for the time to the first token. null: 1,024 and 8,000, as far as the plan
            allows them.
    """

    context: int | None = MISSING
    prompts: list[int] | None = MISSING


@dataclass
class PredictJob(Job):
    """Options of scripts/predict.py.

    Attributes:
        checkpoint: a Hugging Face folder, a .gguf file, or dummy: the model= preset; not beside plan=FOLDER.
        rows: batch sizes for the time between tokens. null: 1, 16, 64 and 256, as far as the plan allows them.
        output: JSON file for the prediction.
    """

    checkpoint: str | None = literal()  # pyright: ignore[reportIncompatibleVariableOverride]
    plan: PlanOrPath = field(default_factory=PlanOrPath)  # pyright: ignore[reportIncompatibleVariableOverride]
    rows: list[int] | None = MISSING
    latency: AloneOptions = field(default_factory=AloneOptions)
    throughput: ThroughputOptions = field(default_factory=ThroughputOptions)
    replay: ReplayOptions = field(default_factory=ReplayOptions)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)  # type: ignore[valid-type]
    output: str | None = literal()

    def check(self, given: Collection[str]) -> None:
        """See :meth:`Job.check`."""
        if self.plan.path is None:
            if self.checkpoint is None:
                raise UsageError(
                    "there is nothing to predict; give plan=FOLDER, or checkpoint= and what a plan is compiled for"
                )
            super().check(given)
        else:
            check_compiled(self.plan, given)
            beside = sorted(
                name for name in given if name == "checkpoint" or (name + ".").startswith("model.")
            )
            if beside:
                raise UsageError(f"{beside[0]} is not read beside plan={self.plan.path}; leave it out")
            if self.kv.memory_gib is not None and not 0 < self.kv.memory_gib < float("inf"):
                raise UsageError(f"kv.memory_gib={self.kv.memory_gib} must be above 0")
        load = self.throughput
        counts = {
            "rows": self.rows or [],
            "latency.context": [1 if self.latency.context is None else self.latency.context],
            "latency.prompts": self.latency.prompts or [],
            "throughput.prompts": [load.prompts],
            "throughput.input": [load.input],
            "throughput.output": [load.output],
            "replay.requests": [1 if self.replay.requests is None else self.replay.requests],
            "replay.block": [self.replay.block],
        }
        for name, values in counts.items():
            if min(values, default=1) < 1:
                raise UsageError(f"{name} must be at least 1")
        if not 0 <= load.ratio <= 1:
            raise UsageError(f"throughput.ratio={load.ratio:g} must be from 0 to 1")
        if not 0 < self.replay.speed < float("inf"):
            raise UsageError(f"replay.speed={self.replay.speed:g} must be above 0")
        trace = self.replay.trace
        if trace is not None and not Path(trace).expanduser().is_file():
            raise UsageError(f"replay.trace={trace} is no file; give a recorded load")
        scheduler_options(self.scheduler)
