"""A small model under compute-sanitizer: no bad access, no leak, no race, and the same tokens as without it.

python tests/gpu/sanitize.py [TOOL ...]      memcheck and synccheck; racecheck and initcheck where named

Compiles a plan of two layers for the GPU at hand, then runs its buckets in a process without torch, once bare
and once under each tool. initcheck reports reads of padding that nobody writes, which poisoned memory shows
to be harmless (test_gpu_executable.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = {
    "memcheck": ["--leak-check", "full"],
    "synccheck": [],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
}
FOUND = 9  # exit code where the tool found something
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
PROMPTS = (5, 33, 1)  # tokens
STEPS = 3


def run(plan_folder: str, checkpoint_folder: str) -> list[list[int]]:
    """Greedy and sampled tokens of a few steps, through an extend bucket and a decode bucket."""
    import numpy as np

    from makeready.engine.llm import LLM, SamplingParams

    llm = LLM(checkpoint_folder, plan=plan_folder, kv_memory_gib=0.25)
    vocabulary = llm.plan.config["vocab_size"]
    prompts = [np.random.default_rng(n).integers(0, vocabulary, n).tolist() for n in PROMPTS]
    sampled = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "sampling_seed": 7, "return_logprob": True}
    tokens = []
    for fields in ({"temperature": 0}, {**sampled, "frequency_penalty": 0.5}):
        params = SamplingParams(max_new_tokens=STEPS, ignore_eos=True, **fields)
        for batch in (prompts, prompts[1:2]):  # a row by itself runs chains of launches as one
            tokens += [list(o.token_ids) for o in llm.generate(token_ids=batch, sampling=params)]
    llm.engine.executable.close()  # type: ignore[attr-defined]
    return tokens


def prepare(folder: Path) -> None:
    """Write ``checkpoint`` and ``plan`` to ``folder``."""
    import torch
    from scripted_steps import SMALL, write_checkpoint

    from makeready.graphs.plan.targets import TARGETS
    from makeready.graphs.planner.compile import compile_plan

    major, minor = torch.cuda.get_device_capability()
    target = next(t.name for t in TARGETS.values() if t.arch == 10 * major + minor)
    checkpoint = write_checkpoint(folder / "checkpoint", {**SMALL, "num_hidden_layers": 2})
    limits = {"max_rows": 4, "max_tokens": 64, "context_len": 128}
    plan = compile_plan(checkpoint, target=target, **limits, max_decode_buckets=1, max_extend_buckets=1)
    plan.save(folder / "plan")


def child(folder: Path, before: list[str]) -> tuple[int, str, list[list[int]] | None]:
    """Exit code, output and tokens of a run behind the words ``before``."""
    command = [*before, sys.executable, __file__, "--run", str(folder / "plan"), str(folder / "checkpoint")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in made.stdout.splitlines() if line.startswith("[[")]
    return made.returncode, made.stdout + made.stderr, json.loads(lines[-1]) if lines else None


def main(tools: list[str]) -> int:
    """Run every tool; returns the exit code."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    sanitizer = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        print("compute-sanitizer is not on PATH; name it in COMPUTE_SANITIZER")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        code, output, expected = child(folder, [])
        if code or expected is None:
            print(output)
            return 1
        bad = 0
        for tool in tools:
            began = time.perf_counter()
            options = ["--tool", tool, "--error-exitcode", str(FOUND), *TOOLS[tool]]
            code, output, tokens = child(folder, [sanitizer, *options])
            same = tokens == expected
            summaries = [line for line in output.splitlines() if "SUMMARY" in line]
            print(
                f"{tool:<10} {time.perf_counter() - began:5.1f} s  exit {code}  same tokens: {same}",
                *summaries,
            )
            if code or not same:
                bad += 1
                print("\n".join(output.splitlines()[:60]))
    return min(bad, 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(run(*sys.argv[2:])))
    else:
        sys.exit(main(sys.argv[1:] or ["memcheck", "synccheck"]))
