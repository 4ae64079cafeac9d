"""Real processes: what this project starts ends with its parent, also where that is killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from makeready.graphs import children

PATIENCE = 300.0  # for a loaded machine; nothing here waits for a time to pass

PARENT = """
import sys, time
from makeready.graphs import children
child = children.start([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""
# Busy in one call that never gives the interpreter's lock back, as a driver's may be.
BUSY = "import ctypes; ctypes.PyDLL(None).pause()"
FOLLOWER = """
import sys, time
from makeready.graphs import children
assert children.follow(children.Leader(sys.argv[1], int(sys.argv[2])))
print("follows", flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it may go between the look and the reading
        return True
    return state in "ZX"


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("code", ["import time; time.sleep(600)", BUSY], ids=["asleep", "busy"])
def test_a_child_ends_with_a_parent_that_is_killed(code):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert not gone(child)
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
        eventually(lambda: gone(child))
    finally:
        parent.kill()
        if not gone(child):
            os.kill(child, signal.SIGKILL)


def test_a_child_runs_to_its_end_and_passes_on_what_it_says():
    code = "import sys, time; print(1); print(2, file=sys.stderr); time.sleep(0.1); sys.exit(3)"
    gc.collect()  # what other tests left open may not be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        done = children.run([sys.executable, "-c", code])
        assert (done.stdout, done.stderr, done.returncode) == ("1\n", "2\n", 3)
    del done
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        children.run(["/no/such/program"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_follows_a_leader_that_did_not_start_it():
    leader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    place = children.this_process().place
    follower = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, place, str(leader.pid)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "follows\n"
        leader.kill()
        assert follower.wait(PATIENCE) == -signal.SIGKILL
    finally:
        leader.kill()
        leader.wait()
        follower.kill()
        follower.communicate()


def test_a_leader_on_another_machine_is_not_followed():
    assert not children.follow(children.Leader("another boot 1", 1))


def test_compilers_end_with_the_planner():
    """The workers that compile kernels, while one of them waits for its first kernel."""
    pytest.importorskip("triton")
    code = textwrap.dedent("""
        import time
        from makeready.graphs.planner.cuda import pool
        worker = pool._worker()
        print(worker.pid, flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        eventually(lambda: gone(worker))
    finally:
        parent.kill()
        parent.communicate()
