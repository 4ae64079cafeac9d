"""Measure speed; see --help."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

from makeready.engine.entrypoints.bench_options import BenchJob, shares_model
from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.status import Stages


def bench_job(job: BenchJob) -> None:
    """Run the suites one after the other, print their tables and write the result."""
    from benchmarks import record
    from benchmarks.bench import Bench
    from benchmarks.suites import SUITES

    lines: list[str] = []
    with Stages() as stages:
        result = record.describe(["python", "scripts/bench.py", *sys.argv[1:]])
        bench = Bench(job, stages)
        try:
            for name in job.suite:
                stages.begin(name)
                if not shares_model(name):
                    bench.release()
                found, said = SUITES[name](bench)
                result |= found
                lines += said
                if job.output is not None:  # after every suite: a later one may fail
                    record.write(Path(job.output).expanduser(), result)
        finally:
            bench.close()
    print("\n".join(lines))


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, BenchJob, bench_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
