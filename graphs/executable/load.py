"""The backend that runs a plan, loaded. Imports it only when asked for."""

from __future__ import annotations

from collections.abc import Callable

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.executable.base import Executable
from makeready.graphs.inspect import units
from makeready.graphs.inspect.split import beside_pages
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.spec import LEAST_PAGES

# On the CPU memory that is not touched costs nothing, so the default is what a full house needs up to this.
DEFAULT_KV_BYTES = 4 * 2**30


def load_executable(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    kv_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda sentence: None,
) -> Executable:
    """Load ``plan`` with the weights of ``checkpoint``.

    Args:
        plan: what to run.
        checkpoint: the one that the plan was made for.
        kv_bytes: memory for KV pages; None gives every row its full context, up to 4 GiB, on a CPU, and takes
            what is free on a GPU, less the plan's own memory and a reserve.
        progress: told how many of how many parameters are loaded.
        report: told in sentences what memory there is for KV pages, and whether the device is another one.

    Raises:
        PlanError: the plan and the checkpoint or the machine do not fit, or the memory holds no page.
        DriverError: the plan is for a GPU, and there is none that works.
    """
    if plan.target != "cpu":
        from makeready.graphs.executable.cuda.executable import CudaExecutable

        return CudaExecutable(plan, checkpoint, kv_bytes=kv_bytes, progress=progress, report=report)

    from makeready.graphs.executable.cpu.executable import CpuExecutable

    pages = kv_pages(plan, kv_bytes)
    if plan.kv.bounded:
        report(
            f"weights {units.nbytes(plan.memory.weights)}; KV cache: {beside_pages(plan, pages)}, "
            f"{units.nbytes(pages * plan.kv.page_bytes)} for {pages - 1:,} pages of {plan.limits.page_size} tokens, "
            f"{(pages - 1) * plan.limits.page_size:,} tokens"
        )
    return CpuExecutable(plan, checkpoint, pages=pages, progress=progress)


def kv_pages(plan: Plan, kv_bytes: int | None) -> int:
    """Pages that ``kv_bytes`` hold, the null page included."""
    everything = plan.limits.max_rows * plan.limits.pages_per_row + 1
    if kv_bytes is None:
        return max(LEAST_PAGES, min(everything, plan.kv.pages_in(DEFAULT_KV_BYTES, plan.limits)))
    return min(asked_pages(plan, kv_bytes), everything)


def asked_pages(plan: Plan, kv_bytes: int) -> int:
    """Pages that ``kv_bytes`` hold beside the windows and states that go with them.

    Raises:
        PlanError: not even two.
    """
    pages = plan.kv.pages_in(kv_bytes, plan.limits)
    if not pages:
        raise PlanError(
            f"kv.memory_gib={kv_bytes / 2**30:.3g} ({kv_bytes} bytes) is too little: "
            f"{plan.least_cache('raise kv.memory_gib')}"
        )
    return pages
