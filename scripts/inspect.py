"""Explain a plan as text or as a page; see --help."""

import os
import sys

# The folder of a script leads Python's path, and its inspect.py would be taken for the standard library's.
sys.path.sort(key=os.path.dirname(os.path.realpath(__file__)).__eq__)  # to the end

from pathlib import Path

from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.options import InspectJob
from makeready.graphs import artifact


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
