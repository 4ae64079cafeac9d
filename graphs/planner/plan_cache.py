"""Plans made before, on this machine: the same request for the same checkpoint is compiled once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from makeready.graphs.checkpoint.base import BLOCKS, Checkpoint
from makeready.graphs.plan import artifact
from makeready.graphs.plan.codec import canonical, to_json
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.targets import find_target
from makeready.graphs.plan.tokenizer_reference import tokenizer_reference

if TYPE_CHECKING:
    from makeready.graphs.planner.compile import Request

SOURCES = Path(__file__).resolve().parents[2]


# Where a user without a home folder, as in many containers, would have the cache: no folder can be made there.
NOWHERE = Path(os.devnull) / "no-home-folder"


def cache_folder() -> Path:
    """``$MAKEREADY_CACHE`` or ``~/.cache/makeready``; where it lies enters no key. It need not be there."""
    named = os.environ.get("MAKEREADY_CACHE")
    try:
        return Path(named) if named else Path.home() / ".cache" / "makeready"
    except RuntimeError:
        return NOWHERE


def cached_plan(
    checkpoint: Checkpoint,
    request: Request,
    make: Callable[[], Plan],
    report: Callable[[str], None] = lambda sentence: None,
) -> tuple[Plan, Path | None, bool]:
    """The plan of ``request`` for ``checkpoint``: from the cache, or made and put there.

    Args:
        report: told where the plan is, or why it could not be kept.

    Returns:
        The plan, its folder, and whether it was there already. A damaged entry is made anew. A cache that
        cannot be written costs nothing but the next start's time: the folder is then None.
    """
    folder = cache_folder() / "plans" / plan_key(checkpoint, request)
    try:
        if folder.exists():
            plan = artifact.load(folder)
            report(f"plan found in {folder}")
            return plan, folder, True
    except (PlanError, OSError):
        pass
    plan = make()
    try:
        artifact.save(plan, folder)
    except (PlanError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        report(
            f"plan compiled, but not kept for the next start: {folder.parent} cannot be written ({reason}); "
            "set MAKEREADY_CACHE to a folder that can"
        )
        return plan, None, False
    report(f"plan compiled to {folder}")
    return plan, folder, False


def plan_key(checkpoint: Checkpoint, request: Request) -> str:
    """SHA-256 over everything a plan depends on: the checkpoint, the request, the planner's code and compiler."""
    parts = {
        "checkpoint": checkpoint.fingerprint(),
        "blocks": {
            n: info.dtype for n, info in checkpoint.tensors.items() if info.kind == BLOCKS
        },  # kept as they are
        "dtype": checkpoint.config.get("dtype"),  # weights are kept in it where nothing else is asked for
        "tokenizer": tokenizer_reference(checkpoint),
        "request": to_json(request),
        "code": code_fingerprint(),
        "compiler": _compilers() if find_target(request.target).is_cuda else "",
    }
    return hashlib.sha256(canonical(parts)).hexdigest()


def _compilers() -> str:
    """Of Triton's kernels and of CUDA C++; a plan may need no NVRTC, and one that does says so when it is made."""
    try:
        nvrtc = version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        nvrtc = "none"
    return f"triton {version('triton')}, NVRTC {nvrtc}"


@lru_cache
def code_fingerprint() -> str:
    """SHA-256 over the sources of graphs/ and kernels/: a plan of other code is never taken from the cache."""
    total = hashlib.sha256()
    for layer in ("graphs", "kernels"):
        sources = (path for path in (SOURCES / layer).rglob("*") if path.suffix in (".py", ".cu", ".h"))
        for path in sorted(sources):
            total.update(str(path.relative_to(SOURCES)).encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
