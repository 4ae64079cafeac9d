"""Many kernels compiled at once, each once on this machine.

The cache holds one file a kernel, named by the content that it depends on: a line of JSON, then the
machine code. A file that does not check is compiled anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

from makeready.graphs import children
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.cuda.aot import Compiled, Kernel, MapLayout, compile_kernel, content_key

Progress = Callable[[int, int], None]

# A worker imports torch and triton first, which takes as long as some kernels take to compile.
_WORTH_WORKERS = 8


def compile_each(
    kernels: Iterable[Kernel], cache: Path, progress: Progress = lambda done, total: None
) -> dict[Kernel, Compiled | PlanError]:
    """Machine code of every kernel, from ``cache`` or compiled on all cores and put there, or why there is none.

    Args:
        progress: told how many of how many are done.
    """
    wanted = list(dict.fromkeys(kernels))
    keys = {kernel: content_key(kernel) for kernel in wanted}
    found: dict[Kernel, Compiled | PlanError] = {
        kernel: made for kernel in wanted if (made := _read(cache / keys[kernel])) is not None
    }
    progress(len(found), len(wanted))
    missing = [kernel for kernel in wanted if kernel not in found]
    for kernel, made in _compile(missing):
        if isinstance(made, Compiled):
            _write(cache / keys[kernel], made)
        found[kernel] = made
        progress(len(found), len(wanted))
    return {kernel: found[kernel] for kernel in wanted}


def _compile(kernels: list[Kernel]) -> Iterator[tuple[Kernel, Compiled | PlanError]]:
    cores = len(os.sched_getaffinity(0))
    if len(kernels) < _WORTH_WORKERS or cores == 1:
        yield from ((kernel, _compile_here(kernel)) for kernel in kernels)
        return
    count = min(cores, len(kernels))
    with _workers(count) as idle, ThreadPoolExecutor(count) as threads:
        running = {threads.submit(_ask, idle, kernel): kernel for kernel in kernels}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _compile_here(kernel: Kernel) -> Compiled | PlanError:
    try:
        return compile_kernel(kernel)
    except PlanError as error:
        return error


@contextmanager
def _workers(count: int) -> Iterator[SimpleQueue[subprocess.Popen[bytes]]]:
    """Processes of their own rather than forks, which the threads of torch would make unsafe."""
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    for _ in range(count):
        idle.put(_worker())
    try:
        yield idle
    finally:
        for _ in range(count):
            process = idle.get()
            process.kill()
            process.communicate()


def _worker() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "makeready.graphs.planner.cuda.worker"]
    return children.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _ask(idle: SimpleQueue[subprocess.Popen[bytes]], kernel: Kernel) -> Compiled | PlanError:
    process = idle.get()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(kernel, process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError):  # a compiler's assertion, or no memory
        process.kill()
        process.communicate()
        process = _worker()
        answer = f"the process that compiled {kernel.function} died; is memory short?"
    finally:
        idle.put(process)
    return PlanError(answer) if isinstance(answer, str) else answer


def _read(path: Path) -> Compiled | None:
    try:
        head, _, cubin = path.read_bytes().partition(b"\n")
        data = json.loads(head)
        if data.pop("sha256") != hashlib.sha256(cubin).hexdigest():
            return None
        data["arguments"] = tuple(data["arguments"])
        data["maps"] = {
            name: MapLayout(**{**layout, "block": tuple(layout["block"])})
            for name, layout in data["maps"].items()
        }
        return Compiled(cubin=cubin, **data)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, made: Compiled) -> None:
    data = {k: v for k, v in asdict(made).items() if k not in ("cubin", "ptx")}
    data["sha256"] = hashlib.sha256(made.cubin).hexdigest()
    # A cache that cannot be written costs time alone; who asked for the plan is told when that is not kept either.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(json.dumps(data).encode() + b"\n" + made.cubin)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
