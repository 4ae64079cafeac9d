"""Whether this machine has the memory that a plan takes, said before it is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from makeready.graphs.plan.plan import Plan, PlanError

GIB = 2**30
# A table of positions is made in pieces that are as large as itself: angles, cosines, sines, and both.
TABLE_COPIES = 3


def check_memory(plan: Plan, free: int | None = None) -> None:
    """Refuse a plan whose parameters this machine cannot hold, before the system ends the process for it.

    Memory of the cache, of slots and of the arena is taken where it is touched, so it does not count here.

    Args:
        free: bytes; None asks the system.

    Raises:
        PlanError: with the arithmetic and the remedy.
    """
    free = free_bytes() if free is None else free
    tables = max((w.nbytes for w in plan.weights if w.param.generated is not None), default=0)
    needed = plan.memory.weights + TABLE_COPIES * tables
    if free is not None and needed > free:
        raise _too_little(plan, f"this machine has {_gib(free)} free")


@contextmanager
def room_for(plan: Plan, pages: int) -> Iterator[None]:
    """Turn what NumPy and PyTorch say about memory that there is not into a sentence."""
    try:
        yield
    except MemoryError:
        pass
    except RuntimeError as error:
        # torch's own class for this is of CUDA's memory alone
        if "allocate memory" not in str(error) and "invalid for input of size" not in str(error):
            raise
    else:
        return
    kv = plan.kv.nbytes(pages, plan.limits)
    raise _too_little(plan, f"with {_gib(kv)} for the cache the system does not give so much")


def free_bytes() -> int | None:
    """Memory that this process may still take, swap included; None where the system does not say."""
    found: list[int] = []
    with suppress(OSError, ValueError):
        said = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
        found.append(1024 * (int(said["MemAvailable"]) + int(said.get("SwapFree", 0))))
    with suppress(OSError, ValueError):
        # A container's own limit; the file says "max" where there is none. The page cache that it counts goes.
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        cached = dict(
            re.findall(r"^(\w+) (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        )
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(cached.get("file", 0))
        found.append(max(limit - used, 0))
    return min(found, default=None)


def _too_little(plan: Plan, reason: str) -> PlanError:
    limits, memory = plan.limits, plan.memory
    tables = sum(w.nbytes for w in plan.weights if w.param.generated is not None)
    rest = memory.fixed - memory.weights
    lower = (
        "plan.context_len"
        if tables + rest > memory.weights - tables
        else "plan.max_rows, or take a smaller model"
    )
    return PlanError(
        f"there is not enough memory: weights take {_gib(memory.weights - tables)}, tables of {limits.context_len:,} "
        f"positions {_gib(tables)}, the buffers of {limits.max_rows} rows {_gib(rest)}, and {reason}; lower {lower}"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:,.2f} GiB"
