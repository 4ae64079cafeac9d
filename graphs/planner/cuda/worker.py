"""A process that compiles kernels: pickled :class:`Kernel` s come in, pickled results or messages go out.

Started by graphs/planner/cuda/pool.py as ``python -m makeready.graphs.planner.cuda.worker``.
"""

from __future__ import annotations

import os
import pickle
import sys

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.cuda.aot import compile_kernel


def main() -> None:
    """Serve until the input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not enter the answers
    while True:
        try:
            kernel = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = compile_kernel(kernel)
        except PlanError as error:
            answer = str(error)
        pickle.dump(answer, out)
        out.flush()


if __name__ == "__main__":
    main()
