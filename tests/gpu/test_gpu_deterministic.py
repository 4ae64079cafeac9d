"""Deterministic plans on the GPU: what a request gets in any batch equals what it gets alone, bit for bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from bucket_steps import cases, run
from scripted_steps import SMALL, write_checkpoint

from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan.targets import TARGETS
from makeready.graphs.planner.compile import compile_plan

LIMITS: dict[str, Any] = {
    "max_rows": 70,
    "max_tokens": 512,
    "context_len": 512,
    "page_size": 64,
    "max_decode_buckets": 6,
    "max_extend_buckets": 8,
    "max_logprob_tokens": 200,
}
MODELS = {
    "bfloat16": {},
    "float16": {"activation_dtype": "float16"},
    "fp8": {"quant": "fp8", "kv_dtype": "float8_e4m3fn"},
    "fp8_block": {"quant": "fp8_block"},
    "int8": {"quant": "int8"},
}
INTERPRETED = 1.5e-2  # see test_gpu_executable.py


def target() -> str:
    major, minor = torch.cuda.get_device_capability()
    found = next((t.name for t in TARGETS.values() if t.arch == 10 * major + minor), None)
    if found is None:
        pytest.skip(f"no target for compute capability {major}.{minor}")
    return found


@pytest.fixture(scope="module", params=MODELS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SMALL)
    options = SchedulerOptions(deterministic=True)
    return LLM(
        checkpoint, target=target(), scheduler=options, kv_memory_gib=1, **LIMITS, **MODELS[request.param]
    )


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Eighty requests of one to 460 tokens that share beginnings, some of whose inputs are scored."""
    random = np.random.default_rng(0)
    stems = random.integers(0, 1024, (3, 400)).tolist()
    prompts, sampling = [], []
    for i, (most, filters) in enumerate(product((0, 1, 17, 64, 65, 128, 200, 399), range(10))):
        own = random.integers(0, 1024, i % 7 + 1).tolist()
        prompts.append([*stems[i % 3][:most], *own])
        sampling.append(
            SamplingParams(
                temperature=[0.0, 0.0, 1.0][i % 3],
                top_k=[-1, 40][filters % 2],
                top_p=[1.0, 0.9][filters // 5],
                repetition_penalty=[1.0, 1.3][i // 3 % 2],
                max_new_tokens=int(random.integers(1, 70)),
                sampling_seed=i,
                return_logprob=True,
                top_logprobs_num=8,
                logprob_start_len=0 if filters == 9 else -1,
                ignore_eos=True,
                stop_token_ids=[3],  # so that nobody knows how long they will be, and pages run out
            )
        )
    return prompts, sampling


def generate(llm: LLM, pages: int | None = None, **options: Any) -> list[Output]:
    """All requests under an engine of these options, whose cache is empty and that has so many pages."""
    executable: Any = llm.engine.executable
    before, executable.pages = executable.pages, pages or executable.pages
    try:
        llm.engine = Engine(executable, SchedulerOptions(deterministic=True, **options))
        prompts, sampling = requests()
        made = llm.generate(
            token_ids=prompts, sampling=sampling, priority=[i % 4 for i in range(len(prompts))]
        )
    finally:
        executable.pages = before
    llm.engine.pool.check()
    assert all(output.error is None for output in made)
    return made


def test_a_request_gets_the_same_bits_in_every_batch(llm: LLM) -> None:
    alone = generate(llm, max_running_requests=1, prefix_cache=False, overlap=False)
    tight: dict[str, Any] = {"policy": "priority", "new_token_ratio": 0.0, "min_new_token_ratio": 0.0}
    batches = {
        "together": generate(llm),
        "chunks of 33": generate(llm, chunked_prefill_size=33),
        "chunks of 200, few pages": generate(
            llm, pages=12, chunked_prefill_size=200, preemption_threshold=1, **tight
        ),
        "nothing shared": generate(llm, prefix_cache=False, decode_interval=3),
    }
    few = batches["chunks of 200, few pages"]
    assert sum(output.meta_info["num_retractions"] for output in few) > 0
    assert sum(output.meta_info["cached_tokens"] for output in batches["together"]) > 1000
    for name, made in batches.items():
        for at, (ours, theirs) in enumerate(zip(made, alone, strict=True)):
            where = f"{name}: request {at}"
            assert ours.token_ids == theirs.token_ids, where
            assert ours.logprobs == theirs.logprobs, where
            assert ours.input_logprobs == theirs.input_logprobs, where


@pytest.mark.parametrize("fields", [MODELS["bfloat16"], MODELS["float16"]], ids=str)
def test_every_bucket_is_the_interpreters(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Kernels and tiles that ordinary plans never use for so few or so many rows."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SMALL)
    limits = {
        "max_rows": 8,
        "max_tokens": 256,
        "context_len": 256,
        "max_decode_buckets": 3,
        "max_extend_buckets": 4,
    }
    plan = compile_plan(checkpoint, target=target(), deterministic=True, **limits, **fields)
    pages = plan.limits.max_rows * plan.limits.pages_per_row + 1
    interpreter = CpuExecutable(plan, checkpoint, pages=pages, interpret=True)
    executable: Any = load_executable(plan, checkpoint, kv_bytes=2**30)
    for case in cases(plan):
        (ours, tokens), (theirs, _) = run(executable, case), run(interpreter, case)
        errors = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
        assert errors.max() <= INTERPRETED, (
            f"{case.bucket}, {case.fill}: logits are off by {errors.max():.2e}"
        )
        assert np.array_equal(tokens, ours.argmax(1)), f"{case.bucket}, {case.fill}"
    executable.close()
