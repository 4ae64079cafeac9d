"""What a CPU plan costs where other processes use the cores as well: tokens a second, and processor time a token.

    python scripts/benchmarks/shared_machine.py CHECKPOINT [busy loops, ...] > FILE

Each number of busy loops is measured with libgomp's own wait (GOMP_SPINCOUNT=300000) and as makeready sets it, in
turns, in processes of their own. What else runs on the machine shows in ``load_average`` of one minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.record import describe

TOKENS, TURNS = 16, 1
WAITS = {"libgomp": {"GOMP_SPINCOUNT": "300000"}, "makeready": {}}
_RUN = """
import json, sys, time
import torch
from makeready.engine.llm import LLM, SamplingParams
began, used = time.perf_counter(), time.process_time()
llm = LLM(sys.argv[1], max_rows=8)
load = time.perf_counter() - began, time.process_time() - used
greedy = SamplingParams(temperature=0, max_new_tokens=int(sys.argv[2]), ignore_eos=True)
llm.generate(["Once"], SamplingParams(temperature=0, max_new_tokens=2))
began, used = time.perf_counter(), time.process_time()
llm.generate(["Once upon a time"], greedy)
seconds, used = time.perf_counter() - began, time.process_time() - used
print(json.dumps({
    "load_s": load[0],
    "load_processor_s": load[1],
    "tokens_per_s": int(sys.argv[2]) / seconds,
    "processor_ms_per_token": 1e3 * used / int(sys.argv[2]),
}))
"""


def measured(checkpoint: str, loops: int, wait: dict[str, str]) -> dict[str, Any]:
    """One run beside ``loops`` busy loops, which end with it."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        time.sleep(0.5)
        before = os.getloadavg()[0]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))} | wait
        command = [sys.executable, "-c", _RUN, checkpoint, str(TOKENS)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {"load_average": before, **json.loads(done.stdout)}


def main() -> None:
    checkpoint, loops = sys.argv[1], [int(n) for n in sys.argv[2:]] or [0, 2, 8]
    runs = [
        {"busy_loops": n, "wait": name, **measured(checkpoint, n, wait)}
        for n in loops
        for _ in range(TURNS)
        for name, wait in WAITS.items()
    ]
    print(json.dumps({**describe(["python", *sys.argv]), "tokens": TOKENS, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
