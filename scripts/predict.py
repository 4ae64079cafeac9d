"""Predict what a plan does on its device; see --help."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.predict_options import PredictJob
from makeready.engine.entrypoints.predicted_text import memory_lines, outcome_lines
from makeready.engine.entrypoints.scheduler_options import scheduler_options
from makeready.engine.entrypoints.status import Stages
from makeready.engine.forecast import Arrival, Forecast, sequence
from makeready.engine.planned import plan_of
from makeready.graphs.plan import artifact

ROWS, PROMPTS, CONTEXT = (
    (1, 16, 64, 256),
    (1024, 8000),
    1024,
)  # what is predicted where nothing else is asked for


def predict_job(job: PredictJob) -> None:
    """Print the table, and write it as JSON where that was asked for."""
    with Stages() as stages:
        stages.begin("read the plan")
        if job.plan.path is not None:
            plan = artifact.load(Path(job.plan.path).expanduser())
        else:
            stages.begin("find or compile a plan")
            plan = plan_of(job.open(), None, job.plan_fields(), stages.say)
        forecast = Forecast(plan, scheduler_options(job.scheduler), job.kv_bytes, report=stages.say)
        stages.begin("predict")
        found = predicted(job, forecast, stages)
    if job.output is not None:
        Path(job.output).expanduser().write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


def predicted(job: PredictJob, forecast: Forecast, stages: Stages) -> dict[str, Any]:
    """Everything that was asked for, as JSON data; times in milliseconds."""
    plan, limits = forecast.plan, forecast.plan.limits
    context = job.latency.context or min(CONTEXT, limits.context_len)
    rows = [n for n in ROWS if n <= limits.max_rows] if job.rows is None else job.rows
    prompts = job.latency.prompts
    if prompts is None:
        prompts = [n for n in PROMPTS if n < limits.context_len]
    between = {n: 1e3 * forecast.token_seconds(n, context) for n in rows}
    first = {length: 1e3 * forecast.first_token_seconds(length) for length in prompts}
    name, outcome = load(job, forecast, stages)
    return {
        "plan": artifact.digest(plan),
        "device": plan.device,
        "memory": forecast.memory(),
        "context": context,
        "time_between_tokens": [{"rows": n, "milliseconds": ms} for n, ms in between.items()],
        "time_to_first_token": [{"prompt_tokens": n, "milliseconds": ms} for n, ms in first.items()],
        name: outcome,
    }


def load(job: PredictJob, forecast: Forecast, stages: Stages) -> tuple[str, dict[str, Any]]:
    """The recorded load, or the random prompts, and what becomes of it."""
    from benchmarks import workloads

    vocabulary, replay, throughput = forecast.plan.config["vocab_size"], job.replay, job.throughput
    if replay.trace is not None:
        rows = workloads.read_trace(Path(replay.trace).expanduser(), replay.requests, replay.block)
        works = workloads.replayed(rows, vocabulary, block=replay.block, speed=replay.speed, seed=replay.seed)
    else:
        works = workloads.random_prompts(
            vocabulary,
            prompts=throughput.prompts,
            input=throughput.input,
            output=throughput.output,
            ratio=throughput.ratio,
            seed=throughput.seed,
        )
    arrivals = [Arrival(work.arrival, sequence(work.prompt, work.output)) for work in works]
    name = "throughput" if replay.trace is None else "replay"
    return name, forecast.run(arrivals, stages.note).record()


def table(found: dict[str, Any]) -> list[str]:
    """The figures as lines of text."""
    lines = [f"predicted for device {found['device']}", *memory_lines(found["memory"])]
    lines += [
        f"{row['rows']:4d} rows of {found['context']:,}: {row['milliseconds']:.2f} ms a token, "
        f"{1e3 * row['rows'] / row['milliseconds']:,.0f} tokens/s"
        for row in found["time_between_tokens"]
    ]
    lines += [
        f"prompt of {row['prompt_tokens']:,} tokens: {row['milliseconds']:.2f} ms to the first token"
        for row in found["time_to_first_token"]
    ]
    for name in ("throughput", "replay"):
        if name in found:
            lines += outcome_lines(found[name], "offline" if name == "throughput" else name)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, PredictJob, predict_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
