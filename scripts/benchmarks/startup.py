"""From a new process to the first token, and what compiling a plan takes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import summary
from makeready.graphs import children

# Each runs in a process of its own, so that nothing is warm but the files. argv: checkpoint, dtype, plan.
_COMPILE = """
import json, sys, time
import torch
began = time.perf_counter()
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.planner.compile import Request, compile_plan
from makeready.graphs.planner.plan_cache import cached_plan
checkpoint, request = open_checkpoint(sys.argv[1]), Request(weight_dtype=sys.argv[2])
plan, _, found = cached_plan(checkpoint, request, lambda: compile_plan(checkpoint, request))
plan.save(sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - began, "found": found}))
"""
_FIRST_TOKEN = """
import json, sys, time
began = time.perf_counter()
import torch
imported = time.perf_counter()
from makeready.engine.llm import LLM, SamplingParams
llm = LLM(sys.argv[1], plan=sys.argv[3])
loaded = time.perf_counter()
llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_new_tokens=1))
done = time.perf_counter()
print(json.dumps({"import_torch": imported - began, "load": loaded - imported, "first_token": done - loaded}))
"""


def startup(checkpoint: Path, *, repeats: int, weight_dtype: str) -> dict[str, Any]:
    """Seconds of each phase over ``repeats`` new processes; compile runs are with an empty and a full cache."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan"
        for run in range(repeats):
            cache = Path(folder) / f"cache-{run}"
            for name, expected in (("compile_cold", False), ("compile_cached", True)):
                made = _run(_COMPILE, checkpoint, weight_dtype, plan, cache)
                assert made["found"] == expected
                found.setdefault(name, []).append(made["seconds"])
            phases = _run(_FIRST_TOKEN, checkpoint, weight_dtype, plan, cache)
            for name, seconds in phases.items():
                found.setdefault(name, []).append(seconds)
            beyond = phases["load"] + phases["first_token"]
            found.setdefault("first_token_beyond_torch", []).append(beyond)
    return {"startup_seconds": {name: summary(seconds) for name, seconds in found.items()}}


def table(result: dict[str, Any]) -> list[str]:
    """The figures as lines of text."""
    return [
        f"{name.replace('_', ' ')}: {seconds['median']:.2f} s ({seconds['min']:.2f}-{seconds['max']:.2f})"
        for name, seconds in result["startup_seconds"].items()
    ]


def _run(code: str, checkpoint: Path, weight_dtype: str, plan: Path, cache: Path) -> dict[str, float]:
    done = children.run(
        [sys.executable, "-c", code, str(checkpoint), weight_dtype, str(plan)],
        env={**os.environ, "MAKEREADY_CACHE": str(cache)},
    )
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
