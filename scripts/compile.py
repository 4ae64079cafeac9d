"""Compile a plan for a checkpoint; see --help."""

import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.golden import summary as golden_summary
from makeready.engine.entrypoints.golden import write_golden
from makeready.engine.entrypoints.options import CompileJob
from makeready.engine.entrypoints.status import Stages
from makeready.graphs import artifact
from makeready.graphs.executable.load import kv_pages
from makeready.graphs.inspect.units import nbytes
from makeready.graphs.plan import Plan, PlanError


def compile_job(job: CompileJob) -> None:
    """Make the plan, or take it from the local cache, and put it where the user wants it."""
    began = time.perf_counter()
    with Stages() as stages:
        stages.begin("read the checkpoint")
        checkpoint = job.open()
        stages.begin("import the planner")
        from makeready.graphs.compile import Request, compile_plan
        from makeready.graphs.plan_cache import cache_folder, cached_plan

        request = Request(**job.plan_fields())
        stages.begin("look into the local cache")
        plan, folder, found = cached_plan(
            checkpoint, request, lambda: compile_plan(checkpoint, request, progress=stages.begin)
        )
        if job.output is not None:
            stages.begin("save")
            folder = artifact.save(plan, Path(job.output).expanduser())
        if folder is None:
            raise PlanError(
                f"the plan was compiled, but {cache_folder()} cannot be written; name a folder with output=, or "
                "set MAKEREADY_CACHE to one that can"
            )
        golden = write_golden(plan, checkpoint, folder, stages) if job.golden else None
    made = "from the local cache" if found else "compiled"
    if plan.binaries:
        from makeready.graphs.cuda.table import resource_table

        print(resource_table(plan), end="\n\n")
    print(summary(plan, folder, kv_pages(plan, job.kv_bytes)))
    if golden is not None:
        print(f"{'golden':<11}{golden_summary(golden)}")
    print(f"{'time':<11}{time.perf_counter() - began:.1f} s, {made}")


def summary(plan: Plan, folder: Path, pages: int) -> str:
    """What was made, in labelled lines; ``pages`` of KV are what a run of it would have."""
    limits, options, memory = plan.limits, plan.options, plan.memory
    buckets = {
        phase: [str(b).split("-")[1] for b in plan.buckets if b.phase == phase] for phase in plan.programs
    }
    files = [path for path in folder.rglob("*") if path.is_file()]
    tokens = (pages - 1) * limits.page_size
    lines = {
        "plan": folder,
        "digest": artifact.digest(plan),
        "model": f"{plan.architecture}, weights {options.weight_dtype}, activations {options.activation_dtype}",
        "target": plan.target,
        "limits": f"{limits.max_rows} rows, {limits.max_tokens:,} tokens a step, context {limits.context_len:,}",
        **{phase: f"{len(made)} buckets: {' '.join(made)}" for phase, made in buckets.items()},
        "memory": f"weights {nbytes(memory.weights)}, arena {nbytes(memory.arena)}, "
        f"host data {nbytes(memory.step + memory.slot + memory.result)}",
        "KV": f"{nbytes(plan.kv.page_bytes)} a page of {limits.page_size} tokens ({options.kv_dtype}); "
        f"{nbytes(pages * plan.kv.page_bytes)} hold {tokens:,} tokens",
        "size": f"{nbytes(sum(path.stat().st_size for path in files))} in {len(files)} files",
    }
    return "\n".join(f"{label:<11}{value}" for label, value in lines.items())


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, CompileJob, compile_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
