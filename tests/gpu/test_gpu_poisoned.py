"""What belongs to nobody is NaN: padding tokens, unowned pages and slots, arena, results. Answers stay, bit for bit.

The twin of tests/end_to_end/test_poisoned.py, which says more. Here padding tokens are NaN from the embedding on:
the row of the id that they have, and no other token has, holds nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from poisoned import NOBODYS_ID, Sequences, answers, assert_same, poison_memory, poisoned_cases
from scripted_steps import SMALL, write_checkpoint

from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.plan.targets import TARGETS
from makeready.graphs.planner.compile import compile_plan

LIMITS: dict[str, Any] = {
    "max_rows": 20,
    "max_tokens": 300,
    "context_len": 200,
    "max_logprob_tokens": 48,
    "max_decode_buckets": 5,
    "max_extend_buckets": 6,
}
LLAMA = {**SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
WINDOWED = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 50}
DYNAMIC = {**SMALL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
QWEN2 = {**SMALL, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
LATENT = {
    **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads", "tie_word_embeddings")},
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 99,
}
HYBRID = {
    **SMALL,
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_only_layers": [0, 1, 2],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {}),
    "qwen2": (QWEN2, {"activation_dtype": "float16"}),
    "qwen3": (SMALL, {}),
    "dynamic": (DYNAMIC, {}),
    "window": (WINDOWED, {}),
    "fp8": (SMALL, {"quant": "fp8"}),
    "int8": (SMALL, {"quant": "int8"}),
    "fp8_block": (SMALL, {"quant": "fp8_block", "kv_dtype": "float8_e4m3fn"}),
    "fp8_cache": (WINDOWED, {"kv_dtype": "float8_e4m3fn"}),
    "fp8_cache_scaled": (SMALL, {"kv_dtype": "fp8_per_token_head"}),
    "int8_cache": (WINDOWED, {"kv_dtype": "int8_per_token_head"}),
    "int4_cache": (SMALL, {"kv_dtype": "int4_per_token_head"}),
    "deterministic_int4": (WINDOWED, {"deterministic": True, "kv_dtype": "int4_per_token_head"}),
    "latent_int8": (LATENT, {"kv_dtype": "int8_per_token_head"}),
    "latent_fp8": (LATENT, {"kv_dtype": "fp8_per_token_head"}),
    "deterministic_latent_fp8": (LATENT, {"deterministic": True, "kv_dtype": "fp8_per_token_head"}),
    "hybrid": (HYBRID, {}),
    "hybrid_bfloat16": (HYBRID, {"kv_state_dtype": "bfloat16"}),
    "deterministic_hybrid": (HYBRID, {"deterministic": True}),
    "deterministic": (SMALL, {"deterministic": True}),
    "deterministic_fp8": (SMALL, {"deterministic": True, "quant": "fp8", "kv_dtype": "float8_e4m3fn"}),
}


def target() -> str:
    major, minor = torch.cuda.get_device_capability()
    found = next((t.name for t in TARGETS.values() if t.arch == 10 * major + minor), None)
    if found is None:
        pytest.skip(f"no target for compute capability {major}.{minor}")
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_belongs_to_nobody_changes_no_bit(name: str, tmp_path) -> None:
    config, fields = MODELS[name]
    checkpoint = write_checkpoint(tmp_path, config)
    plan = compile_plan(checkpoint, target=target(), **LIMITS, **fields)
    kv_bytes = plan.kv.nbytes(Sequences(plan).needed, plan.limits)
    executable = CudaExecutable(plan, checkpoint, kv_bytes=kv_bytes)
    bucket = plan.buckets[0]
    launches = plan.programs[bucket.phase].launches
    (table,) = {launch.operands["weight"] for launch in launches if launch.op == "embedding"}
    usual = executable.peek(bucket, table)
    nobodys = usual.copy()
    nobodys[NOBODYS_ID] = np.iinfo(usual.dtype).max
    seen = set()
    for case in poisoned_cases(plan):
        executable.poke(bucket, table, usual)
        clean = answers(executable, case)
        executable.poke(bucket, table, nobodys)
        assert_same(clean, answers(executable, case, poison_memory), f"{case.bucket}, {case.fill}")
        seen.add(case.bucket)
    assert seen == set(plan.buckets)
    executable.close()
