"""Explain a plan as text or as a page; see --help."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.options import InspectJob
from makeready.graphs.plan import artifact


def inspect_job(job: InspectJob) -> None:
    """Print the plan, or write the page."""
    plan = artifact.load(Path(job.plan.path).expanduser())
    if job.html is None:
        from makeready.graphs.inspect.text import plan_text

        print(plan_text(plan, job.context), end="")
        return
    from makeready.graphs.inspect.html import plan_html

    page = Path(job.html).expanduser()
    page.write_text(plan_html(plan, job.context), encoding="utf-8")
    print(f"page written to {page}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, InspectJob, inspect_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
