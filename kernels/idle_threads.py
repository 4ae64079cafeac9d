"""How long PyTorch's threads wait for work with a core in their hands.

PyTorch shares its loops among threads with libgomp, whose threads spin for 300,000 turns (about 5 ms) at the end
of every loop before they sleep. On a core that other processes use as well, the thread that is waited for is
often not running, and every layer of every step spins these milliseconds away: bench/results/cpu_shared.json.
libgomp cuts the wait to 1,000 turns (about 15 us) as soon as it has more threads than cores, and has no other
switch once it is loaded. So a second team of threads is made here, which sleeps and is never used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading

SWITCHES = (
    "GOMP_SPINCOUNT",
    "OMP_WAIT_POLICY",
)  # environment variables of libgomp that say how long it waits


@functools.cache
def spin_briefly() -> bool:
    """Let threads of this process that wait for each other sleep soon, as on a machine with too many of them.

    Returns:
        Whether this did it: not where :data:`SWITCHES` say how long to wait, one thread does all the work, or
        PyTorch's threads are not libgomp's.
    """
    if any(name in os.environ for name in SWITCHES):
        return False
    try:
        gomp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)  # PyTorch's, or none
        nothing = ctypes.CDLL(None).labs  # what the threads of the team run: one argument, no effect
        cores = gomp.omp_get_num_procs()
    except (OSError, AttributeError):
        return False
    if cores < 2:
        return False
    made = threading.Event()

    def hold() -> None:
        # A team lives as long as the thread that began it.
        gomp.GOMP_parallel(
            ctypes.cast(nothing, ctypes.c_void_p), None, ctypes.c_uint(cores), ctypes.c_uint(0)
        )
        made.set()
        threading.Event().wait()

    threading.Thread(target=hold, name="idle team", daemon=True).start()
    made.wait()
    return True
