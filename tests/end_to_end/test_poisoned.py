"""What belongs to nobody is NaN: padding rows and tokens, unowned pages and slots, arena, results. Answers stay.

Every bucket of every plan runs full and as empty as it may be, on the CPU; tests/gpu/test_gpu_poisoned.py is
the twin on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from poisoned import Sequences, answers, assert_same, poison_memory, poisoned_cases

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.paired import PairedCheckpoint
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.plan.spec import INPUT_LOGPROBS
from makeready.graphs.planner.compile import compile_plan
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS

registry.discover()
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 40,  # no multiple of a vector or a panel
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
DYNAMIC = {**QWEN3, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
WINDOWED = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 11}
WIDE = {**QWEN3, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256}  # whole blocks of 128
LATENT = {
    **{k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads", "tie_word_embeddings")},
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
LATENT_V3 = {
    **LATENT,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_routed_experts": 6,
    "n_group": 1,
    "topk_group": 1,
}
EAGLE3 = {
    **{k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"},
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 50,
    "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
}
EAGLE = {
    **{k: v for k, v in EAGLE3.items() if k not in ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids")},
    "architectures": ["LlamaForCausalLMEagle"],
}
HYBRID = {
    **QWEN3,
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "layer_types": ["linear_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
LIMITS: dict[str, Any] = {
    "max_rows": 5,
    "max_tokens": 40,
    "context_len": 60,
    "page_size": 8,
    "max_logprob_tokens": 16,
    "max_decode_buckets": 3,
    "max_extend_buckets": 4,
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {}),
    "qwen2": (QWEN2, {"weight_dtype": "float32"}),
    "qwen3": (QWEN3, {"weight_dtype": "float16", "kv_dtype": "bfloat16"}),
    "dynamic": (DYNAMIC, {}),
    "window": (WINDOWED, {"kv_dtype": "float16"}),
    "fp8": (QWEN3, {"quant": "fp8"}),
    "fp8_block": (WIDE, {"quant": "fp8_block", "kv_dtype": "float8_e4m3fn"}),
    "fp8_cache": (LLAMA, {"kv_dtype": "float8_e4m3fn"}),
    "int8_cache": (QWEN3, {"kv_dtype": "int8_per_token_head"}),
    "fp8_cache_scaled": (LLAMA, {"kv_dtype": "fp8_per_token_head", "disabled_passes": ("fuse_qkv",)}),
    "int4_cache": (WINDOWED, {"kv_dtype": "int4_per_token_head"}),
    "int8": (QWEN3, {"quant": "int8"}),
    "latent": (LATENT, {"quant": "fp8", "kv_dtype": "float8_e4m3fn"}),
    "latent_int8": (LATENT, {"kv_dtype": "int8_per_token_head"}),
    "deterministic_latent_fp8": (LATENT, {"deterministic": True, "kv_dtype": "fp8_per_token_head"}),
    "hybrid": (HYBRID, {}),
    "hybrid_bfloat16": (HYBRID, {"kv_state_dtype": "bfloat16"}),
    "hybrid_int4": (HYBRID, {"kv_dtype": "int4_per_token_head"}),
    "deterministic_hybrid": (HYBRID, {"deterministic": True}),
    "deterministic": (QWEN3, {"deterministic": True}),
    "deterministic_fp8": (QWEN2, {"deterministic": True, "quant": "fp8", "kv_dtype": "float8_e4m3fn"}),
    "deterministic_int4": (WINDOWED, {"deterministic": True, "kv_dtype": "int4_per_token_head"}),
    "drafts": (QWEN3, {"speculative": {"method": "ngram", "num_draft_tokens": 3}}),
    "drafts_of_a_model": (
        QWEN3,
        {"speculative": {"method": "draft", "num_draft_tokens": 3}, "beside": QWEN2},
    ),
    "drafts_of_a_head": (
        QWEN3,
        {"speculative": {"method": "eagle3", "num_draft_tokens": 2}, "beside": EAGLE3},
    ),
    "drafts_in_trees": (WINDOWED, {"speculative": {"method": "draft", "tree": [2, 1]}, "beside": QWEN2}),
    "drafts_of_a_head_in_trees": (
        QWEN3,
        {"speculative": {"method": "eagle3", "tree": [[0], [0, 0], [1], [0, 0, 0]]}, "beside": EAGLE3},
    ),
    "drafts_of_a_head_of_eagle_1": (
        QWEN3,
        {"speculative": {"method": "eagle", "num_draft_tokens": 2}, "beside": EAGLE},
    ),
    "drafts_of_a_layer": (LATENT_V3, {"speculative": {"method": "mtp", "num_draft_tokens": 2}}),
    "plain": (QWEN3, {"disabled_passes": ("merge_linears", "fuse_add_norm", "fuse_qkv", "hoist_gather")}),
}


@pytest.fixture(autouse=True)
def large_weights() -> Iterator[None]:
    """Weights of the usual size leave the logits so small that all tokens are alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("makeready.graphs.checkpoint.dummy.SCALE", 0.3)
        yield


def load(name: str) -> CpuExecutable:
    config, fields = MODELS[name]
    checkpoint: Checkpoint = DummyCheckpoint(dict(config))
    if "beside" in fields:
        checkpoint = PairedCheckpoint(checkpoint, DummyCheckpoint(dict(fields["beside"])))
    asked = {field: value for field, value in fields.items() if field != "beside"}
    plan = compile_plan(checkpoint, **LIMITS, **asked)
    return CpuExecutable(plan, checkpoint, pages=Sequences(plan).needed)


def leaking(op: str, operand: str) -> Any:
    """``registry.find``; but NaN anywhere in ``operand`` shows in all that ``op`` gives."""
    contract, found = CONTRACTS[op], registry.find
    at = [o.name for o in contract.inputs].index(operand)

    def run(*operands: Any, **attrs: Any) -> Any:
        made = contract.reference(*operands, **attrs)
        first, *rest = made if isinstance(made, tuple) else (made,)
        nothing = 0 * operands[at].float().nan_to_num(1.0, 1.0, 1.0) + operands[at].isnan()
        first = first + nothing.sum().to(first.dtype)
        return (first, *rest) if rest else first

    def find(name: str, kernel: str, target: str) -> registry.Kernel:
        return registry.Kernel(op, kernel, target, run) if name == op else found(name, kernel, target)

    return find


@pytest.mark.parametrize(
    ("op", "operand"),
    [
        ("decode_attention", "q"),  # padding rows
        ("silu_mul", "gate_up"),  # padding tokens
        ("extend_attention", "v_cache"),  # unowned pages
        ("recurrent_delta_rule", "state"),  # unowned states
        ("causal_conv_silu", "x"),  # padding tokens
        ("token_logprobs", "logits"),  # padding rows, at the end of a program
    ],
)
def test_a_kernel_that_looks_at_them_is_found(op: str, operand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find", leaking(op, operand))
    executable = load("hybrid" if op in ("recurrent_delta_rule", "causal_conv_silu") else "llama")
    differ = set()
    for case in poisoned_cases(executable.plan):
        clean, poisoned = answers(executable, case), answers(executable, case, poison_memory)
        differ |= {name for name in clean if clean[name].tobytes() != poisoned[name].tobytes()}
    assert differ


@pytest.mark.parametrize("name", MODELS)
def test_what_belongs_to_nobody_changes_no_bit(name: str) -> None:
    executable = load(name)
    seen, kinds = set(), set()
    for case in poisoned_cases(executable.plan):
        where = f"{case.bucket}, {case.fill}"
        clean = answers(executable, case)
        assert_same(clean, answers(executable, case, poison_memory), where)
        seen.add(case.bucket)
        kinds.add(case.bucket.phase)
        if case.bucket.phase == INPUT_LOGPROBS:
            assert (clean["target_logprob"] < 0).all(), "nobody asked for log-probabilities"
    assert seen == set(executable.plan.buckets)
    assert kinds == set(executable.plan.steps)
    assert len(kinds) == 3 + name.startswith("drafts")
