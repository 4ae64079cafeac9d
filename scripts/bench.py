"""Measure decode speed and start-up; see --help."""

import os
import sys

# The folder of a script leads Python's path, and its inspect.py would be taken for the standard library's.
sys.path.sort(key=os.path.dirname(os.path.realpath(__file__)).__eq__)  # to the end

from pathlib import Path
from typing import Any

from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.options import BenchJob
from makeready.engine.entrypoints.status import Stages


def bench_job(job: BenchJob) -> None:
    """Run the suites one after the other, print their tables and write the result."""
    with Stages() as stages:
        stages.begin("import")
        import torch
        from benchmarks import record
        from benchmarks.decode import decode
        from benchmarks.startup import startup

        torch.set_num_threads(job.threads or os.cpu_count() or 1)
        checkpoint = Path(job.checkpoint).expanduser()
        result = record.describe(["python", "scripts/bench.py", *sys.argv[1:]])
        result["threads"] = torch.get_num_threads()
        if "decode" in job.suite:
            stages.begin("decode")
            result |= decode(
                checkpoint,
                rows=job.rows,
                tokens=job.tokens,
                repeats=job.repeats,
                weight_dtype=job.weight_dtype,
            )
        if "startup" in job.suite:
            stages.begin("startup")
            result |= startup(checkpoint, repeats=job.repeats, weight_dtype=job.weight_dtype)
    print(table(result))
    if job.output is not None:
        record.write(Path(job.output).expanduser(), result)


def table(result: dict[str, Any]) -> str:
    """The result as aligned text: medians, and the range of the ratios."""
    lines = []
    for row in result.get("decode", []):
        speeds = {name: s["median"] for name, s in row["tokens_per_second"].items()}
        ratio = row["ratio"]
        lines.append(
            f"decode, {row['rows']} rows: {speeds['makeready']:.1f} tokens/s, "
            f"transformers {speeds['transformers']:.1f}, ratio {ratio['median']:.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    for name, seconds in result.get("startup_seconds", {}).items():
        lines.append(
            f"{name.replace('_', ' ')}: {seconds['median']:.2f} s ({seconds['min']:.2f}-{seconds['max']:.2f})"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, BenchJob, bench_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
