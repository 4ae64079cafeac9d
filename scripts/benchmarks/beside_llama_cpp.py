"""A GGUF file's decode, prefill and loading against llama.cpp (llama-cpp-python), in turns within one process.

Both greedy, one sequence, the same threads. A decode step's time is (time of ``tokens + 1`` new tokens - time of 1) /
``tokens``, prefill that of a prompt up to its first token. Each loading has a process of its own, without the time of
imports; makeready's plan was compiled before. On a shared machine the least time of several says most: ``best``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import summary
from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs import children

PROMPT_TOKENS, LONG_PROMPT, CONTEXT = 16, 512, 2048
Generate = Callable[[list[int], int], None]

# argv: file, threads, whether llama.cpp may repack weights
_OURS = """
import json, sys, time
import torch
from benchmarks.beside_llama_cpp import CONTEXT
from makeready.engine.llm import LLM
import makeready.graphs.executable.cpu.executable
torch.set_num_threads(int(sys.argv[2]))
began = time.perf_counter()
LLM(sys.argv[1], max_rows=8, context_len=CONTEXT, quant="stored")
print(json.dumps(time.perf_counter() - began))
"""
_THEIRS = """
import json, sys, time
from benchmarks.beside_llama_cpp import opened
import llama_cpp
began = time.perf_counter()
made = opened(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True")
seconds = time.perf_counter() - began
made.eval([1] * 32)
made.eval([1])
print(json.dumps(seconds))
"""


def opened(path: str, threads: int, repacks: bool) -> Any:
    """llama.cpp's model."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    from llama_cpp import llama_cpp as low  # pyright: ignore[reportMissingImports]

    if not repacks:
        default = low.llama_model_default_params

        def without() -> Any:
            params = default()
            params.use_extra_bufts = False
            return params

        low.llama_model_default_params = llama_cpp.llama_model_default_params = without
    sizes = {"n_ctx": CONTEXT, "n_batch": LONG_PROMPT, "n_ubatch": LONG_PROMPT}
    return llama_cpp.Llama(path, **sizes, n_threads=threads, n_threads_batch=threads, verbose=False)


def beside_llama_cpp(checkpoint: Path, *, tokens: int, repeats: int, threads: int) -> dict[str, Any]:
    """Measure both.

    Args:
        checkpoint: a GGUF file.
        tokens: decode steps of a measurement.
        repeats: measurements of each; ours and theirs take turns.
    """
    before = os.getloadavg()
    # Some builds end the process in their products of repacked weights (AMX where the system forbids it).
    repacks = _seconds(_THEIRS, checkpoint, threads, True) is not None
    load: dict[str, list[float]] = {"makeready": [], "llama.cpp": []}
    _seconds(_OURS, checkpoint, threads, repacks)  # not counted: compiles the plan
    for _ in range(repeats):
        for name, code in (("makeready", _OURS), ("llama.cpp", _THEIRS)):
            seconds = _seconds(code, checkpoint, threads, repacks)
            assert seconds is not None, f"loading with {name} failed"
            load[name].append(seconds)
    llm = LLM(checkpoint, max_rows=8, context_len=CONTEXT, quant="stored")
    engines = {"makeready": _ours(llm), "llama.cpp": _theirs(opened(str(checkpoint), threads, repacks))}
    decode, prefill = ({name: [] for name in engines} for _ in range(2))
    pick = random.Random(0)
    vocabulary = llm.plan.config["vocab_size"]
    for turn in range(repeats + 1):
        for name, generate in engines.items():
            short, long = (
                [pick.randrange(vocabulary) for _ in range(n)] for n in (PROMPT_TOKENS, LONG_PROMPT)
            )
            step = (_timed(generate, short, tokens + 1) - _timed(generate, short, 1)) / tokens
            prompt = _timed(generate, long, 1) / LONG_PROMPT
            if turn:  # first calls allocate
                decode[name].append(1 / step)
                prefill[name].append(1 / prompt)
    return {
        "file": checkpoint.name,
        "llama_cpp_repacks": repacks,
        "load_average": {"before": before, "after": os.getloadavg()},
        "decode_tokens_per_second": _both(decode, max),
        "prefill_tokens_per_second": _both(prefill, max),
        "load_seconds": _both(load, min),
    }


def table(result: dict[str, Any]) -> list[str]:
    """The figures as lines of text."""
    lines = []
    for name in ("decode_tokens_per_second", "prefill_tokens_per_second", "load_seconds"):
        best = result[name]["best"]
        lines.append(
            f"{name.replace('_', ' ')}: {best['makeready']:.4g}, llama.cpp {best['llama.cpp']:.4g}, "
            f"ratio {best['makeready'] / best['llama.cpp']:.2f}"
        )
    return lines


def _both(values: dict[str, list[float]], best: Callable[..., float]) -> dict[str, Any]:
    found: dict[str, Any] = {name: summary(all_) for name, all_ in values.items()}
    return found | {"best": {name: best(all_) for name, all_ in values.items()}}


def _timed(generate: Generate, prompt: list[int], count: int) -> float:
    began = time.perf_counter()
    generate(prompt, count)
    return time.perf_counter() - began


def _ours(llm: LLM) -> Generate:
    def generate(prompt: list[int], count: int) -> None:
        params = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True)
        (output,) = llm.generate(token_ids=[prompt], sampling=params)
        assert output.completion_tokens == count

    return generate


def _theirs(model: Any) -> Generate:
    def generate(prompt: list[int], count: int) -> None:
        model.reset()
        model.eval(prompt)
        for _ in range(count - 1):
            model.eval([model.sample(temp=0.0)])
        model.sample(temp=0.0)

    return generate


def _seconds(code: str, checkpoint: Path, threads: int, repacks: bool) -> float | None:
    """What a new process prints; None where it ends badly."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    done = children.run(
        [sys.executable, "-c", code, str(checkpoint), str(threads), str(repacks)],
        env={**os.environ, "PYTHONPATH": path},
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
