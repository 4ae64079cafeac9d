"""Explain a plan as text or as a page; see --help.

The folder of a script leads Python's path, so that scripts beside this one, and all that they import, find this
file where they mean the standard library's module of the same name. As ``inspect`` it therefore hands over that
one; nothing else is imported on the way, since almost any module needs it.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from makeready.engine.entrypoints.options import InspectJob


def inspect_job(job: InspectJob) -> None:
    """Print the plan, or write the page."""
    from pathlib import Path

    from makeready.graphs import artifact

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
    from makeready.engine.entrypoints.cli import launch
    from makeready.engine.entrypoints.options import InspectJob

    return launch(__file__, InspectJob, inspect_job, arguments)


def _hand_over() -> None:
    """Put the standard library's module into this one's place among the imported ones."""
    here = os.path.dirname(os.path.realpath(__file__))
    others = [folder for folder in sys.path if os.path.realpath(folder or os.curdir) != here]
    spec = PathFinder.find_spec(__name__, others)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])


if __name__ == "__main__":
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # Ctrl-C while modules are imported ends without a traceback
    sys.exit(main())
if __name__ == "inspect":
    _hand_over()
