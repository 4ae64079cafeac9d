"""Serve a checkpoint over HTTP; see --help."""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

from makeready.engine.entrypoints.cli import launch
from makeready.engine.entrypoints.serve import serve_job
from makeready.engine.entrypoints.serve_options import ServeJob


def main(arguments: list[str] | None = None) -> int:
    """Run with ``arguments``, or the process's; returns the exit code."""
    return launch(__file__, ServeJob, serve_job, arguments)


if __name__ == "__main__":
    sys.exit(main())
