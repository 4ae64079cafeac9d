"""New processes on a GPU machine: a plan is read and loaded, and the first step runs.

The processes import neither torch nor triton nor transformers; the result says which were there all the same.
Weights come from the page cache where the files were read before: the first process is reported apart.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import summary
from makeready.graphs import children

_CHILD = """
import time
began = time.perf_counter()
import json, sys
from makeready.graphs.plan import artifact
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.example import typical_step
imported = time.perf_counter()
source, config, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
checkpoint = open_checkpoint(source, config=config)
plan = artifact.load(folder)
opened = time.perf_counter()
executable = CudaExecutable(plan, checkpoint)
loaded = time.perf_counter()
bucket = min(plan.buckets)
executable.launch(bucket, typical_step(executable, bucket)).wait()
stepped = time.perf_counter()
print(json.dumps({
    "seconds": {
        "imports": imported - began, "read_plan": opened - imported, "load": loaded - opened,
        "first_step": stepped - loaded,
    },
    "phases": executable.startup,
    "graphs": len(plan.buckets),
    "driver_mib": executable.graph_bytes / 2**20,
    "pages": executable.pages,
    "weight_bytes": sum(w.nbytes for w in plan.weights),
    "foreign": sorted({m.split(".")[0] for m in sys.modules} & {"torch", "triton", "transformers"}),
}))
"""


def start(plan: Path, checkpoint: str, config: Mapping[str, Any] | None, *, repeats: int) -> dict[str, Any]:
    """Seconds of each phase of the first process, and over ``repeats`` more.

    Args:
        plan: folder of a plan for this machine's GPU.
        checkpoint: a folder, a file, or ``dummy`` with the ``config`` of a model.
    """
    first, *others = (_run(plan, checkpoint, config) for _ in range(1 + repeats))
    phases = {name: summary([run["phases"][name] for run in others]) for name in first["phases"]}
    seconds = {name: summary([run["seconds"][name] for run in others]) for name in first["seconds"]}
    rate = first["weight_bytes"] / phases["weights"]["median"]
    fixed = {name: first[name] for name in ("graphs", "driver_mib", "pages", "weight_bytes", "foreign")}
    return {
        "first": first["seconds"],
        "seconds": seconds,
        "phases": phases,
        "weights_per_second": rate,
        **fixed,
    }


def _run(plan: Path, checkpoint: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    began = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, checkpoint, json.dumps(config), str(plan)]
    done = children.run(command)
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["seconds"]["process"] = time.perf_counter() - began
    return found


def table(found: Mapping[str, Any]) -> list[str]:
    """A line for the first process, one for the others, and what loading consists of."""

    def line(seconds: Mapping[str, float]) -> str:
        until = sum(seconds[name] for name in ("imports", "read_plan", "load", "first_step"))
        return (
            f"{until:.2f} s to the first step (" + ", ".join(f"{k} {v:.2f}" for k, v in seconds.items()) + ")"
        )

    medians: Sequence[tuple[str, float]] = [(k, v["median"]) for k, v in found["phases"].items()]
    return [
        f"first process: {line(found['first'])}",
        f"the others:    {line({k: v['median'] for k, v in found['seconds'].items()})}",
        "of loading:    " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in medians),
        f"{found['weight_bytes'] / 1e9:.1f} GB of weights at {found['weights_per_second'] / 1e9:.1f} GB/s, "
        f"{found['pages']} KV pages, {found['graphs']} graphs in {found['driver_mib']:.1f} MiB of the driver's; "
        f"foreign modules: {', '.join(found['foreign']) or 'none'}",
    ]
