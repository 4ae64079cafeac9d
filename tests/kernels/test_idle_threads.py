"""Threads that wait for each other sleep soon: libgomp's own state is read, no time is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# A loop that PyTorch shares among two threads makes its team first, whoever asked for less waiting before.
PROGRAM = """
    import ctypes, json, os, threading
    import torch
    torch.set_num_threads(2)
    torch.zeros(1 << 20).add_(1)
    from makeready.kernels.idle_threads import spin_briefly
    before = len(os.listdir("/proc/self/task"))
    done = [spin_briefly(), spin_briefly()]
    torch.zeros(1 << 20).add_(1)
    cores = ctypes.CDLL("libgomp.so.1").omp_get_num_procs()
    print(json.dumps([done, before, len(os.listdir("/proc/self/task")), cores, torch.get_num_threads()]))
"""


def ran(**environment: str) -> list:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(
    "libgomp" not in Path("/proc/self/maps").read_text(), reason="PyTorch's threads are not libgomp's here"
)
def test_there_are_more_threads_than_cores_so_that_they_sleep_soon():
    done, before, after, cores, threads = ran()
    if cores < 2:
        assert done == [False, False]
        return
    assert done == [True, True]
    # One team of as many threads as cores, made once: libgomp counts it and PyTorch's, which still has two.
    assert after - before == cores
    assert after > cores
    assert threads == 2


def test_who_says_how_long_to_wait_is_obeyed():
    for switch in ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}):
        done, before, after, _, _ = ran(**switch)
        assert done == [False, False]
        assert after == before
