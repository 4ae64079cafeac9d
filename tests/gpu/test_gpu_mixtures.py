"""Mixtures of experts on the GPU: steps as the CPU interprets the same plan, in 16 and 8 bits.

python -m pytest tests/gpu/test_gpu_mixtures.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from gguf import GGMLQuantizationType as Types
from moe_models import gguf_file
from scripted_steps import SMALL, play, write_checkpoint
from test_gpu_quantized import REQUEST, check_weights, same, target

from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan.plan import Plan
from makeready.graphs.planner.compile import compile_plan

QWEN3: dict[str, Any] = SMALL | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
QWEN2 = QWEN3 | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 60,
    "shared_expert_intermediate_size": 256,
    "mlp_only_layers": [1],
}
MIXTRAL = SMALL | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
DEEPSEEK = SMALL | {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "moe_intermediate_size": 128,
    "n_routed_experts": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
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
GPT_OSS = SMALL | {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "intermediate_size": 320,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "sliding_window": 48,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3": (QWEN3, {}),
    "qwen3-fp16": (QWEN3, {"weight_dtype": "float16"}),
    "qwen3-fp8": (QWEN3, {"quant": "fp8"}),
    "qwen3-int8": (QWEN3, {"quant": "int8"}),
    "deepseek_v2-int8": (LATENT, {"quant": "int8"}),
    "qwen3-int4": (QWEN3, {"quant": "int4"}),
    "qwen3-mxfp4": (QWEN3, {"quant": "mxfp4"}),
    "qwen3-nvfp4": (QWEN3, {"quant": "nvfp4"}),
    "qwen3-gguf": (QWEN3, {"quant": "stored"}),
    "qwen3-fp8-block": (QWEN3, {"quant": "fp8_block"}),
    "qwen3-deterministic": (QWEN3, {"deterministic": True}),
    "qwen2": (QWEN2, {}),
    "qwen2-fp8-block": (QWEN2, {"quant": "fp8_block"}),
    "mixtral": (MIXTRAL, {}),
    "deepseek": (DEEPSEEK, {}),
    "gpt_oss": (GPT_OSS, {}),
    "gpt_oss-mxfp4": (GPT_OSS | MXFP4, {}),
    "gpt_oss-mxfp4-deterministic": (GPT_OSS | MXFP4, {"deterministic": True}),
    "deepseek_v2": (LATENT, {}),
    "deepseek_v2-fp8-cache": (LATENT, {"kv_dtype": "float8_e4m3fn"}),
    "deepseek_v2-deterministic": (LATENT, {"deterministic": True}),
}
# Of a row's logits, ‖a - b‖ / ‖b‖. A rounding may put another expert into a token's choice, which moves that
# token and those that see it: a few rows may be off by more, as long as most are not.
TOLERANCE, MOST_BEYOND = {16: 0.03, 8: 0.12}, 0.2


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[str, Plan, Checkpoint]:
    config, asked = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(folder, config)
    if asked.get("quant") == "stored":  # experts in blocks, all else wide
        checkpoint = open_checkpoint(gguf_file(folder, "qwen3moe", Types.Q4_1))
    return request.param, compile_plan(checkpoint, target=target(), **REQUEST, **asked), checkpoint


@pytest.fixture
def executable(case):
    loaded = load_executable(*case[1:], kv_bytes=2**30)
    assert isinstance(loaded, CudaExecutable)
    yield loaded
    loaded.close()


def test_weights_are_the_cpus(executable, case):
    check_weights(executable, case[2])


def test_steps_are_the_cpus(executable, case):
    name, plan, checkpoint = case
    interpreted = play(CpuExecutable(plan, checkpoint, pages=executable.pages, interpret=True))
    errors = []
    for ours, theirs in zip(play(executable), interpreted, strict=True):
        for row, (mine, want) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            errors.append(float(np.linalg.norm(mine - want) / np.linalg.norm(want)))
            assert ours.tokens[row] == mine.argmax()
    print(f"\n{name}: logits are off by {np.median(errors):.4f}, at most {max(errors):.3f}")
    beyond = np.mean(np.array(errors) > TOLERANCE[8 if "fp8" in name or "int8" in name else 16])
    assert beyond <= MOST_BEYOND, f"{beyond:.0%} of {len(errors)} rows are off: {sorted(errors)[-8:]}"


def test_poisoned_and_repeated_steps_are_identical(executable):
    first = play(executable)
    same(play(executable, poison=True), first)
    same(play(executable), first)
