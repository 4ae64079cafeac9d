"""Two lanes on the GPU: the same bits as one behind the other, in an arena that holds NaN before every step.

python -m pytest tests/gpu/test_gpu_lanes.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from scripted_steps import SMALL, play, write_checkpoint
from test_gpu_quantized import REQUEST, same, target

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.example import typical_step
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import ONE_LANE, lanes_key
from makeready.graphs.planner.compile import compile_plan

DEEPSEEK: dict[str, Any] = SMALL | {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "moe_intermediate_size": 128,
    "n_routed_experts": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
QWEN2 = SMALL | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "moe_intermediate_size": 128,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 256,
}
LATENT = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek": (DEEPSEEK, {}),
    "deepseek-fp8-block": (DEEPSEEK, {"quant": "fp8_block"}),
    "deepseek-deterministic": (DEEPSEEK, {"deterministic": True}),
    "qwen2": (QWEN2, {}),
    "deepseek_v2": (LATENT, {}),
}
ROUNDS = 20  # what may run at once does not always


@pytest.fixture(scope="module", params=CASES)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Checkpoint]:
    config, asked = CASES[request.param]
    checkpoint = write_checkpoint(tmp_path_factory.mktemp(request.param), config)
    return compile_plan(checkpoint, target=target(), lanes=True, **REQUEST, **asked), checkpoint


@contextmanager
def loaded(plan: Plan, checkpoint: Checkpoint) -> Iterator[CudaExecutable]:
    executable = CudaExecutable(plan, checkpoint, kv_bytes=2**30)
    yield executable
    executable.close()


def in_one_lane(plan: Plan, device: str) -> Plan:
    """The same launches at the same places, one behind the other."""
    return replace(plan, tuned={device: {lanes_key(bucket): ONE_LANE for bucket in plan.buckets}})


def test_two_lanes_give_the_bits_of_one(case: tuple[Plan, Checkpoint]) -> None:
    plan, checkpoint = case
    assert all(program.lanes for program in plan.programs.values())
    with loaded(in_one_lane(plan, torch.cuda.get_device_name()), checkpoint) as executable:
        wanted = play(executable, poison=True)
    with loaded(plan, checkpoint) as executable:
        for _ in range(ROUNDS):
            same(play(executable, poison=True), wanted)


def test_a_plan_without_lanes_gives_the_same_bits(case: tuple[Plan, Checkpoint]) -> None:
    plan, checkpoint = case
    asked = {"deterministic": plan.options.deterministic, "quant": plan.options.quant}
    plain = compile_plan(checkpoint, target=plan.target, lanes=False, **REQUEST, **asked)
    assert not any(program.lanes for program in plain.programs.values())
    with loaded(plain, checkpoint) as executable:
        wanted = play(executable, poison=True)
    with loaded(plan, checkpoint) as executable:
        same(play(executable, poison=True), wanted)


def test_parts_of_a_step_have_lanes_too(case: tuple[Plan, Checkpoint]) -> None:
    """A step that is cut in two within a lane leaves what a whole one does."""
    plan, checkpoint = case
    with loaded(plan, checkpoint) as executable:
        bucket = next(b for b in reversed(plan.buckets) if b.phase == "decode")
        program = plan.programs[bucket.phase]
        lane, count = program.lanes[0], len(program.launches)
        logits = next(each.operands["logits"] for each in program.launches if each.op == "sample")
        step = typical_step(executable, bucket, 64)
        executable.launch(bucket, step).wait()
        whole = executable.peek(bucket, logits)
        for cut in range(lane.fork + 1, lane.stop + 1):
            executable.poison()
            assert list(executable.walk(bucket, step, stops=(cut, count))) == [cut, count]
            assert (executable.peek(bucket, logits) == whole).all(), cut
