"""A small model end to end on the GPU: against the CPU executable, poisoned, repeated, and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from bucket_steps import cases, run
from scripted_steps import FORCED, PROMPTS, SMALL, Played, open_slot, play, script, write_checkpoint

from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.executable import golden
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.targets import TARGETS
from makeready.graphs.planner.compile import compile_plan

KV_BYTES = 2**30  # several live at once, beside PyTorch: none may take all that is free
REQUEST = {
    "max_rows": 8,
    "max_tokens": 256,
    "context_len": 256,
    "max_logprob_tokens": 64,
    "max_decode_buckets": 2,
    "max_extend_buckets": 3,
}
# bfloat16 activations over three layers against float32 ones, as ‖a - b‖ / ‖b‖ of a row's logits.
TOLERANCE = 3e-2
# Against the interpreter, which rounds at the same places and sums in another order.
INTERPRETED = 1.5e-2

WITHOUT_COMPILERS = """
import json, re, sys
for name in ("torch", "triton", "transformers", "cuda.bindings.nvrtc", "cuda.bindings.nvjitlink"):
    sys.modules[name] = None
from makeready.engine.llm import LLM, SamplingParams
llm = LLM(sys.argv[1], plan=sys.argv[2], kv_memory_gib=1)
outputs = llm.generate(
    token_ids=json.loads(sys.argv[3]),
    sampling=SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True),
)
mapped = open("/proc/self/maps").read()
compilers = sorted(set(re.findall(r"lib(?:nvrtc|nvJitLink|nvvm|triton|torch|LLVM)\\w*", mapped)))
print(json.dumps([[list(o.token_ids) for o in outputs], compilers]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SMALL)


@pytest.fixture(scope="module")
def plan(checkpoint):
    major, minor = torch.cuda.get_device_capability()
    target = next((t.name for t in TARGETS.values() if t.arch == 10 * major + minor), None)
    if target is None:
        pytest.skip(f"no target for compute capability {major}.{minor}")
    return compile_plan(checkpoint, target=target, **REQUEST)


@pytest.fixture
def executable(plan, checkpoint):
    loaded = load_executable(plan, checkpoint, kv_bytes=KV_BYTES)
    assert isinstance(loaded, CudaExecutable)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def reference(checkpoint):
    """The script on the CPU: the same weights, float32 between kernels."""
    plan = compile_plan(checkpoint, target="cpu", page_size=64, **REQUEST)
    return play(load_executable(plan, checkpoint, kv_bytes=KV_BYTES))


def same(first: list[Played], second: list[Played]) -> None:
    for at, (one, other) in enumerate(zip(first, second, strict=True)):
        assert np.isfinite(one.logits).all(), f"step {at}"
        assert np.array_equal(one.logits, other.logits), f"step {at}: logits differ"
        assert np.array_equal(one.tokens, other.tokens), f"step {at}: tokens differ"


def test_logits_and_greedy_tokens_are_the_cpus(executable, reference):
    decided = 0
    for at, (ours, theirs) in enumerate(zip(play(executable), reference, strict=True)):
        for row, (mine, want) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            error = np.linalg.norm(mine - want) / np.linalg.norm(want)
            assert error <= TOLERANCE, f"step {at}, row {row}: logits are off by {error:.2e}"
            best = np.sort(want)[-2:]
            if best[1] - best[0] > 2 * np.abs(mine - want).max():
                decided += 1
                assert ours.tokens[row] == theirs.tokens[row], f"step {at}, row {row}"
            assert ours.tokens[row] == mine.argmax()
    assert decided > 0.3 * FORCED * len(PROMPTS), "too few rows have a clear winner to compare"


def test_every_bucket_is_the_interpreters_and_reads_nothing_unwritten(plan, checkpoint, executable):
    pages = plan.limits.max_rows * plan.limits.pages_per_row + 1
    interpreter = CpuExecutable(plan, checkpoint, pages=pages, interpret=True)
    seen, decided, rows = set(), 0, 0
    for case in cases(plan):
        seen.add(case.bucket)
        where = f"{case.bucket}, {case.fill}"
        (ours, tokens), (theirs, wanted) = run(executable, case), run(interpreter, case)
        again, same_tokens = run(executable, case, poison=True)
        assert np.array_equal(again, ours), f"{where}: poisoned memory changed logits"
        assert np.array_equal(same_tokens, tokens), where
        errors = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
        assert errors.max() <= INTERPRETED, f"{where}: logits are off by {errors.max():.2e}"
        assert np.array_equal(tokens, ours.argmax(1)), where
        best = np.sort(theirs, axis=1)[:, -2:]
        clear = best[:, 1] - best[:, 0] > 2 * np.abs(ours - theirs).max(1)
        assert np.array_equal(tokens[clear], wanted[clear]), where
        decided, rows = decided + clear.sum(), rows + len(clear)
    assert seen == set(plan.buckets)
    assert decided > 0.3 * rows, "too few rows have a clear winner to compare"


def test_golden_tokens_are_the_interpreters(plan, checkpoint, executable, tmp_path):
    made = golden.predict(plan, checkpoint, [1, 2, 3, 4, 5], 12)
    golden.check(made, executable, checkpoint)
    other = write_checkpoint(tmp_path / "other", SMALL, scale=0.05)
    changed = load_executable(plan, other, kv_bytes=KV_BYTES)
    with pytest.raises(PlanError, match="are not those that"):
        golden.check(made, changed, other)
    ours = replace(made, weights=golden.weights_checksum(plan, other))
    with pytest.raises(PlanError, match="the golden check failed at token"):
        golden.check(ours, changed, other)
    changed.close()


def test_poisoned_memory_changes_no_bit(executable):
    clean = play(executable)
    same(play(executable, poison=True), clean)


def test_repeated_runs_are_identical(plan, checkpoint, executable):
    first = play(executable)
    same(play(executable), first)
    again = load_executable(plan, checkpoint, kv_bytes=KV_BYTES)
    same(play(again), first)
    again.close()


def test_sampled_tokens_feed_the_next_step_without_the_host(executable, plan):
    def run(wait: bool) -> list[list[int]]:
        pending = []
        for slot, length in enumerate(PROMPTS):
            open_slot(executable, slot, prompt_len=length)
        for step in script(plan, feed=True):
            pending.append(executable.launch(step.bucket, step.arrays))
            if wait:
                pending[-1].wait()
        return [p.wait()["tokens"][: len(PROMPTS)].tolist() for p in pending]

    expected = run(wait=True)
    assert len({tuple(tokens) for tokens in expected}) > 3
    for _ in range(3):
        assert run(wait=False) == expected


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="measures the whole GPU's memory: run it alone"
)
def test_everything_is_given_back(plan, checkpoint):
    load_executable(plan, checkpoint, kv_bytes=KV_BYTES).close()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        load_executable(plan, checkpoint, kv_bytes=KV_BYTES).close()
    assert torch.cuda.mem_get_info()[0] >= before - 2**21


def test_a_process_without_torch_or_any_compiler_gives_the_same_tokens(plan, checkpoint, tmp_path):
    folder = artifact.save(plan, tmp_path / "plan")
    prompts = [np.random.default_rng(n).integers(0, SMALL["vocab_size"], n).tolist() for n in PROMPTS]
    llm = LLM(checkpoint, plan=folder, kv_memory_gib=1)
    sampling = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    expected = [list(o.token_ids) for o in llm.generate(token_ids=prompts, sampling=sampling)]
    made = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILERS, str(checkpoint.path), str(folder), json.dumps(prompts)],
        # The driver itself may not compile either: no PTX.
        env={k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
        | {"PATH": "", "CUDA_DISABLE_PTX_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1]) == [expected, []]
