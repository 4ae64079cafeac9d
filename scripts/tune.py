"""Choose the fastest of the ways that a plan carries, on the GPU; see --help."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.status import Stages
from makeready.engine.entrypoints.tune_options import TuneJob
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import PlanError

if TYPE_CHECKING:
    from makeready.graphs.executable.tune import Gain


def tune_job(job: TuneJob) -> None:
    """Load the plan, measure, write the table into the plan's folder and print what it gains."""
    folder = Path(job.plan.path).expanduser()
    with Stages() as stages:
        stages.begin("read plan and checkpoint")
        plan = artifact.load(folder)
        if plan.target == "cpu":
            raise PlanError(
                f"{folder} is for target cpu, which has one way to run a call; tune plans for GPUs"
            )
        checkpoint = job.open()
        from makeready.graphs.executable.cuda.executable import CudaExecutable
        from makeready.graphs.executable.tune import tune

        stages.begin("load")
        executable = CudaExecutable(
            plan,
            checkpoint,
            progress=lambda done, total: stages.note(f"{done} of {total} weights"),
            report=stages.say,
        )
        stages.begin("measure")
        tuned, gains = tune(
            executable,
            context=job.context,
            progress=lambda done, total, bucket: stages.note(f"{_bar(done, total)} {bucket}"),
        )
        executable.close()
        artifact.save_tuned(tuned, folder)
    print(table(gains))


def _bar(done: int, total: int, width: int = 30) -> str:
    full = done * width // max(total, 1)
    return f"[{'#' * full}{'.' * (width - full)}] {done} of {total} choices"


def table(gains: Sequence[Gain]) -> str:
    """One line a bucket: milliseconds of a step before and after, and what runs another way now."""
    from makeready.graphs.inspect import text

    rows = [
        (
            str(gain.bucket),
            f"{1e3 * gain.before:.3f}",
            f"{1e3 * gain.after:.3f}",
            f"{100 * (1 - gain.after / gain.before):.1f} %",
            str(gain.tried),
            ", ".join(sorted(set(gain.choices.values()))) or "nothing",
        )
        for gain in gains
    ]
    head = ("bucket", "before ms", "after ms", "gain", "tried", "changed")
    return "\n".join(line.rstrip() for line in text.table(head, rows, "<>>>><"))


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, TuneJob, tune_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
