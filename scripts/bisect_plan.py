"""Find the launch that computes something else than the interpreter of the same plan; see --help."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

from makeready.engine.entrypoints.bisect_options import BisectJob
from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.status import Stages
from makeready.engine.text.tokenizer import load_tokenizer
from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import Plan, PlanError

if TYPE_CHECKING:
    from makeready.graphs.executable.bisect import Walking


def bisect_job(job: BisectJob) -> None:
    """Load the plan twice, compare, and print what differs first.

    Raises:
        PlanError: something does, or it cannot be compared.
    """
    from makeready.graphs.executable.bisect import as_references, bisect, pages_needed
    from makeready.graphs.executable.cpu.executable import CpuExecutable

    folder = Path(job.plan.path).expanduser()
    with Stages() as stages:
        stages.begin("read plan and checkpoint")
        plan, checkpoint = artifact.load(folder), job.open()
        ids = job.token_ids or _encode(checkpoint, job.prompt or "")
        vocabulary = plan.config["vocab_size"]
        if not all(0 <= i < vocabulary for i in ids):
            raise PlanError(f"token_ids={ids} leave the vocabulary, which ends at {vocabulary - 1}")
        pages = pages_needed(plan, len(ids), job.tokens, job.rows)
        if plan.kv.states:
            pages = max(pages, plan.kv.pages_of_rows(job.rows, plan.limits))

        def loaded(done: int, total: int) -> None:
            stages.note(f"{done} of {total} weights")

        stages.begin("load the interpreter")
        reference = CpuExecutable(
            as_references(plan), checkpoint, pages=pages, progress=loaded, interpret=True
        )
        stages.begin("load the device")
        device = _device(plan, checkpoint, pages)
        stages.begin("compare")
        found = bisect(device, reference, ids, job.tokens, rows=job.rows, progress=stages.note)
        device.close()
    if found.difference is not None:
        print(found.difference.sentence(plan))
        raise PlanError(
            f"{folder} computes something else on this machine than its interpreter, see above; "
            "compile the plan again, or report the launch"
        )
    print(
        f"no launch differs: {found.launches} launches of {found.steps} steps, of what is allowed at most "
        f"{found.nearest:.0%}; tokens {list(found.tokens)}"
    )
    if len(found.tokens) < job.tokens:
        print("then the logits were no numbers to choose a token by, in both")


def _encode(checkpoint: Checkpoint, prompt: str) -> list[int]:
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise PlanError(f"{checkpoint.path} has no tokenizer; give token_ids=[ID,ID] instead of prompt=")
    return list(tokenizer.encode(prompt))


def _device(plan: Plan, checkpoint: Checkpoint, pages: int) -> Walking:
    """The plan as this machine runs it."""
    if plan.target == "cpu":
        from makeready.graphs.executable.cpu.executable import CpuExecutable

        return CpuExecutable(plan, checkpoint, pages=pages)
    from makeready.graphs.executable.cuda.executable import CudaExecutable

    return CudaExecutable(plan, checkpoint, kv_bytes=plan.kv.nbytes(pages, plan.limits))


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, BisectJob, bisect_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
