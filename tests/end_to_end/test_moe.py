"""Mixtures of experts against transformers in fp32, and DeepSeek-V1 against a plain reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference import Recorder, compare, expected, make_model, prompt_of

from makeready.engine.llm import LLM

PAGE = 8
PLAN: dict[str, Any] = {
    "max_rows": 4,
    "max_tokens": 64,
    "page_size": PAGE,
    "weight_dtype": "float32",
}
LENGTHS = (1, 7, 63, 65)

QWEN2 = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2_moe", {**QWEN2, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen2-60": ("qwen2_moe", {**QWEN2, "num_experts": 60, "num_experts_per_tok": 4}),
    "qwen2-some-dense": (
        "qwen2_moe",
        {**QWEN2, "num_experts_per_tok": 1, "num_hidden_layers": 4, "mlp_only_layers": [1]},
    ),
    "qwen2-every-other": (
        "qwen2_moe",
        {**QWEN2, "num_experts_per_tok": 2, "num_hidden_layers": 3, "decoder_sparse_step": 2},
    ),
    "qwen3": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "qwen3-128": (
        "qwen3_moe",
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 16, "head_dim": 32},
    ),
    "qwen3-all": ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 24}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-3-of-3": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    model = make_model(tmp_path, family, **config)
    recorder = Recorder(LLM(tmp_path, **PLAN))
    for length in LENGTHS:
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 8)
        compare(ours, expected(model, prompt, 8))
