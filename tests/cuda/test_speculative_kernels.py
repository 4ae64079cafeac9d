"""Plans for a GPU whose steps run a second model: every kind's programs compile, also where kinds compute alike."""

from __future__ import annotations

from typing import Any

import pytest

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.checkpoint.paired import PairedCheckpoint
from makeready.graphs.plan import artifact
from makeready.graphs.plan.spec import VERIFY
from makeready.graphs.planner.compile import compile_plan

pytest.importorskip("triton")
MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
HEAD = {
    **MODEL,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 500,
    "eagle_aux_hidden_state_layer_ids": [1, 2, 5],
}
EAGLE = {
    **{k: v for k, v in HEAD.items() if k not in ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids")},
    "architectures": ["LlamaForCausalLMEagle"],
}
LATENT = {
    **{k: v for k, v in MODEL.items() if k not in ("head_dim", "num_key_value_heads")},
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LIMITS: dict[str, Any] = {"max_rows": 4, "max_tokens": 64, "context_len": 256, "page_size": 64}
LIMITS |= {"max_decode_buckets": 1, "max_extend_buckets": 1}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "eagle3": ("eagle3", MODEL, HEAD, {"deterministic": True, "quant": "fp8"}),
    "eagle": ("eagle", MODEL, EAGLE, {}),
    "draft": ("draft", MODEL, MODEL, {"kv_dtype": "float8_e4m3fn"}),
    "mtp": ("mtp", LATENT, None, {"deterministic": True}),
    "beside-latents": ("draft", LATENT, MODEL, {}),
}


@pytest.mark.parametrize(
    "case", ["eagle3", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "eagle3")]
)
def test_steps_of_two_models_compile(case: str, tmp_path: Any) -> None:
    method, model, second, options = CASES[case]
    checkpoint: Any = DummyCheckpoint(dict(model))
    if second is not None:
        checkpoint = PairedCheckpoint(checkpoint, DummyCheckpoint(dict(second)))
    asked = {"method": method, "num_draft_tokens": 2, "forced_acceptance": 0.7}
    plan = compile_plan(checkpoint, target="sm_90a", speculative=asked, **LIMITS, **options)
    ops = [launch.op for launch in plan.programs[VERIFY].launches]
    assert ops.count("next_draft") == 2
    assert ops.count("sample") == 3
    assert ops[-2:] == ["force_drafts", "accept_drafts"]
    assert artifact.load(plan.save(tmp_path / "plan")).digest == plan.digest


@pytest.mark.parametrize(
    "method", ["eagle3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eagle", "draft"))]
)
def test_steps_of_trees_compile(method: str, tmp_path: Any) -> None:
    _, model, second, _ = CASES[method]
    checkpoint = PairedCheckpoint(DummyCheckpoint(dict(model)), DummyCheckpoint(dict(second or {})))
    plan = compile_plan(
        checkpoint, target="sm_90a", speculative={"method": method, "tree": [3, 2, 1]}, **LIMITS
    )
    ops = [launch.op for launch in plan.programs[VERIFY].launches]
    assert ops.count("place_level") == 3
    assert ops.count("sample") == 3 + 2 + 1 + 1
    assert ops.count("tree_attention") == 5 + 3 * (5 if method == "draft" else 1) + 4 * (method == "draft")
    assert ops.count("move_entries") == 5 + (5 if method == "draft" else 1)
    assert artifact.load(plan.save(tmp_path / "plan")).digest == plan.digest
