"""Small models and kernels in CUDA C++ under compute-sanitizer: no bad access, leak or race, and the same results.

python tests/gpu/sanitize.py [TOOL ...]      memcheck and synccheck; racecheck and initcheck where named

Compiles plans of two layers for the GPU at hand, then runs their buckets in a process without torch, once bare
and once under each tool. initcheck reports reads of padding that nobody writes, which poisoned memory shows
to be harmless (test_gpu_executable.py). Prefill attention in CUDA C++, which a small plan leaves to Triton, runs by
itself: each head size and cache, a few rows, held to the reference; so do products of experts, in all their tiles,
and latent attention.
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
from typing import Any

TOOLS = {
    "memcheck": ["--leak-check", "full"],
    "synccheck": [],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
}
FOUND = 9  # exit code where the tool found something
RESULT = "result: "  # what a child's last line begins with
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
PROMPTS = (5, 33, 1)  # tokens
ROWS = ((1, 1), (70, 200), (0, 0), (3, 65), (1, 300))  # queries, context
HEADS = ((8, 2, 128), (7, 1, 64), (2, 1, 256))  # heads, KV heads, size
WINDOWS = (0, 100)
STEPS = 3
MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS = {"dense": ({}, None), "mixture": (MIXTURE, None), "mixture_fp8": (MIXTURE, "fp8_block")}


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


def attend() -> int:
    """Prefill attention in CUDA C++, each kernel with a few rows, against the reference; how many ways ran."""
    sys.path.append(str(Path(__file__).parents[2] / "scripts"))
    import torch
    from benchmarks.gpu import launcher
    from test_gpu_attention import planned, prefill_case

    torch.manual_seed(0)
    ways = 0
    for cache in (torch.bfloat16, torch.float8_e4m3fn):
        for heads, kv_heads, size in HEADS:
            for window in WINDOWS:
                contract, emit, tensors, attrs = prefill_case(
                    planned, ROWS, cache, heads, kv_heads, size, 64, window
                )
                launcher.check(contract, emit, tensors, attrs)
                ways += len(planned(launcher.op_call(contract, tensors, attrs)))
    return ways


def attend_latents() -> int:
    """Latent attention in CUDA C++, a few rows for each number of columns, against the references; how many ran."""
    sys.path += [str(Path(__file__).parents[2] / "scripts"), str(Path(__file__).parents[1] / "emulator")]
    from test_gpu_mla_cuda import SMALL, check

    for make in SMALL:
        check(make)
    return len(SMALL)


def multiply() -> int:
    """Products of experts in CUDA C++, every tile, rows gathered or not, against float64; how many ways ran."""
    sys.path += [str(Path(__file__).parents[2] / "scripts"), str(Path(__file__).parents[1] / "kernels")]
    from test_gpu_moe import ALLOWED, PRODUCTS, SCALES, SUFFIX, attrs_of, every_tile, hold, small

    ways = 0
    for scales in SCALES:
        for product in PRODUCTS:
            for gathered in (True, False):
                op, attrs = product + SUFFIX[scales], attrs_of(scales, 0 if gathered else 2)
                tensors = small("spread", gathered, scales, (40, 6, 2, 256, 512))
                found = every_tile(op, tensors, attrs)
                hold(op, tensors, attrs, found, ALLOWED[scales])
                ways += len(found)
    return ways


def prepare(folder: Path, model: str) -> None:
    """Write ``checkpoint`` and ``plan`` of one of MODELS to ``folder``."""
    import torch
    from scripted_steps import SMALL, write_checkpoint

    from makeready.graphs.plan.targets import TARGETS
    from makeready.graphs.planner.compile import compile_plan

    major, minor = torch.cuda.get_device_capability()
    target = next(t.name for t in TARGETS.values() if t.arch == 10 * major + minor)
    changes, quant = MODELS[model]
    checkpoint = write_checkpoint(folder / "checkpoint", {**SMALL, **changes, "num_hidden_layers": 2})
    limits = {"max_rows": 4, "max_tokens": 64, "context_len": 128}
    few = {"max_decode_buckets": 1, "max_extend_buckets": 1}
    plan = compile_plan(checkpoint, target=target, quant=quant, **limits, **few)
    plan.save(folder / "plan")


def child(before: list[str], *arguments: str) -> tuple[int, str, Any]:
    """Exit code, output and result (the last line's) of this file with ``arguments`` behind the words ``before``."""
    command = [*before, sys.executable, __file__, *arguments]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in made.stdout.splitlines() if line.startswith(RESULT)]
    result = json.loads(lines[-1].removeprefix(RESULT)) if lines else None
    return made.returncode, made.stdout + made.stderr, result


def main(tools: list[str]) -> int:
    """Run every tool; returns the exit code."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    sanitizer = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        print("compute-sanitizer is not on PATH; name it in COMPUTE_SANITIZER")
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        runs = [("--attend",), ("--latents",), ("--multiply",)]
        for model in MODELS:
            folder = Path(temporary) / model
            prepare(folder, model)
            runs.append(("--run", str(folder / "plan"), str(folder / "checkpoint")))
        bad = 0
        for arguments in runs:
            code, output, expected = child([], *arguments)
            if code or expected is None:
                print(output)
                return 1
            bad += sum(not clean(sanitizer, tool, arguments, expected) for tool in tools)
    return min(bad, 1)


def clean(sanitizer: str, tool: str, arguments: tuple[str, ...], expected: Any) -> bool:
    """Whether ``tool`` finds nothing and the result is ``expected``; says so."""
    began = time.perf_counter()
    options = TOOLS[tool] if arguments[0] == "--run" else []  # torch keeps its memory to the end
    before = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *options]
    code, output, result = child(before, *arguments)
    summaries = [line for line in output.splitlines() if "SUMMARY" in line]
    name = " ".join(Path(a).parent.name or a for a in arguments[:2])  # the option, and of a plan the model
    print(
        f"{tool:<10} {name:<18} {time.perf_counter() - began:5.1f} s  exit {code}  "
        f"same result: {result == expected}",
        *summaries,
    )
    if code or result != expected:
        print("\n".join(output.splitlines()[:60]))
    return not code and result == expected


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(RESULT + json.dumps(run(*sys.argv[2:])))
    elif sys.argv[1:] == ["--attend"]:
        print(RESULT + json.dumps(attend()))
    elif sys.argv[1:] == ["--latents"]:
        print(RESULT + json.dumps(attend_latents()))
    elif sys.argv[1:] == ["--multiply"]:
        print(RESULT + json.dumps(multiply()))
    else:
        sys.exit(main(sys.argv[1:] or ["memcheck", "synccheck"]))
