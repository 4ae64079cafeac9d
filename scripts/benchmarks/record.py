"""What every result says of itself, and how it is written."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers", "triton", "cuda-bindings", "tokenizers", "numpy", "llama-cpp-python")


def describe(command: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, commit and command of a run.

    ``commit`` is git's name for the commit that the files come from, with ``-dirty`` where some differ. Where
    git does not know them, as in a copy of the tree on another machine, it is what the environment variable
    MAKEREADY_COMMIT says, and else null.
    """
    return {
        "device": f"{_processor()}, {os.cpu_count()} cores",
        **({"gpus": gpus} if (gpus := _gpus()) else {}),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "commit": commit(ROOT),
        "command": " ".join(command),
    }


def commit(tree: Path) -> str | None:
    """The commit of a tree's files; see :func:`describe`."""
    # A copy of the tree may lie inside of a repository of something else.
    if _git(tree, "rev-parse", "--show-prefix") == "":
        found = _git(tree, "describe", "--always", "--dirty")
        if found:
            return found
    return os.environ.get("MAKEREADY_COMMIT") or None


def _git(tree: Path, *words: str) -> str | None:
    """What git says of a tree; None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "runs": len(values),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, its keys in the order that they were given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def _gpus() -> list[str]:
    """Name, memory and driver of every GPU, as the driver's own tool prints them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
