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
from makeready.graphs.executable.cuda.memory import kv_memory
from makeready.graphs.executable.load import asked_pages, kv_pages
from makeready.graphs.inspect.split import beside_pages
from makeready.graphs.inspect.units import nbytes
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.targets import target_of


def compile_job(job: CompileJob) -> None:
    """Make the plan, or take it from the local cache, and put it where the user wants it."""
    began = time.perf_counter()
    with Stages() as stages:
        stages.begin("read the checkpoint")
        checkpoint = job.open()
        stages.begin("import the planner")
        from makeready.graphs.planner.compile import Request, compile_plan
        from makeready.graphs.planner.plan_cache import cache_folder, cached_plan

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
        from makeready.graphs.planner.cuda.table import resource_table

        print(resource_table(plan), end="\n\n")
    print(summary(plan, folder, job.kv_bytes))
    if golden is not None:
        print(f"{'golden':<11}{golden_summary(golden)}")
    print(f"{'time':<11}{time.perf_counter() - began:.1f} s, {made}")


def kv_line(plan: Plan, kv_bytes: int | None) -> str:
    """How many tokens the cache of a run holds: on a GPU, of the one that the plan was chosen for."""
    page, target, room = plan.kv.page_bytes, target_of(plan), ""
    if not target.is_cuda:
        pages = kv_pages(plan, kv_bytes)
    elif kv_bytes is not None:
        pages = asked_pages(plan, kv_bytes)
    else:
        try:
            pages = kv_memory(plan, target.device.memory, None).pages
        except PlanError as error:
            return f"{nbytes(page)} a page; on {target.device.name} {error}"
        room = f" of an empty {target.device.name}"
    tokens = (pages - 1) * plan.limits.page_size
    beside = beside_pages(plan, pages)
    return (
        f"{nbytes(page)} a page of {plan.limits.page_size} tokens ({plan.options.kv_dtype}); "
        f"{nbytes(pages * page)}{room} hold {tokens:,} tokens{f'; {beside}' if beside else ''}"
    )


def summary(plan: Plan, folder: Path, kv_bytes: int | None) -> str:
    """What was made, in labelled lines; ``kv_bytes`` is what a run may take for its cache."""
    limits, options, memory = plan.limits, plan.options, plan.memory
    buckets = {
        phase: [str(b).split("-")[1] for b in plan.buckets if b.phase == phase] for phase in plan.programs
    }
    files = [path for path in folder.rglob("*") if path.is_file()]
    lines = {
        "plan": folder,
        "digest": artifact.digest(plan),
        "model": f"{plan.architecture}, weights {options.weight_dtype}, activations {options.activation_dtype}",
        "target": f"{plan.target}, chosen for device {plan.device}",
        "limits": f"{limits.max_rows} rows, {limits.max_tokens:,} tokens a step, context {limits.context_len:,}",
        **{phase: f"{len(made)} buckets: {' '.join(made)}" for phase, made in buckets.items()},
        "memory": f"weights {nbytes(memory.weights)}, arena {nbytes(memory.arena)}, "
        f"host data {nbytes(memory.step + memory.slot + memory.result)}",
        "KV": kv_line(plan, kv_bytes),
        "size": f"{nbytes(sum(path.stat().st_size for path in files))} in {len(files)} files",
    }
    return "\n".join(f"{label:<11}{value}" for label, value in lines.items())


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, CompileJob, compile_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
