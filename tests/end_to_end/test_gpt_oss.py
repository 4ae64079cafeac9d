"""gpt-oss against transformers in fp32: sinks, alternating windows, biases everywhere, clamped SwiGLU, YaRN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.passes import REWRITES
from makeready.graphs.plan.plan import PlanError

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 64, "page_size": 8, "weight_dtype": "float32"}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
SMALL: dict[str, Any] = {
    "head_dim": 32,
    "num_local_experts": 6,
    "num_experts_per_tok": 4,
    "intermediate_size": 40,
    "sliding_window": 24,
    "initializer_range": 0.15,
    "rope_parameters": {**YARN, "truncate": False, "original_max_position_embeddings": 16},
}
MODELS: dict[str, dict[str, Any]] = {
    "small": {},
    "as-released": {"num_local_experts": 32, "num_hidden_layers": 3, "sliding_window": 128, "max_position_embeddings": 512},
    "narrow-window": {"sliding_window": 2, "num_hidden_layers": 3, "num_local_experts": 5, "num_experts_per_tok": 1},
    "own-layers": {"layer_types": ["full_attention", "full_attention"], "num_attention_heads": 8, "head_dim": 16},
    "truncated": {"rope_parameters": {**YARN, "truncate": True, "original_max_position_embeddings": 16}},
}  # fmt: skip


def made(folder: Path, seed: int = 0, **config: Any) -> Any:
    """A model whose sinks lie among scores: without them logits change by a tenth and more."""
    model = make_model(folder, "gpt_oss", seed=seed, **{**SMALL, **config})
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=1.0, std=2.0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = made(tmp_path, **MODELS[name])
    recorder = Recorder(LLM(tmp_path, **PLAN))
    for length in (1, 23, 65, 140):
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 6)
        compare(ours, expected(model, prompt, 6))


@pytest.mark.parametrize("deterministic", [False, True])
def test_batched_equals_alone(deterministic: bool, tmp_path: Path) -> None:
    """Prompts that are cut, that share a prefix, and rows that generate beside them."""
    model = made(tmp_path, seed=3)
    shared = prompt_of(70, 131)
    prompts = [prompt_of(n, 131, seed=n) for n in (60, 1, 9, 90, 3)] + [
        shared,
        [*shared, 5],
        [*shared[:41], 7, 8],
    ]
    llm = LLM(tmp_path, **PLAN, deterministic=deterministic)
    recorder = Recorder(llm)
    made_together = recorder.generate(prompts, 5)
    again = recorder.generate(prompts[-2:], 5)
    for prompt, ours in zip(prompts + prompts[-2:], made_together + again, strict=True):
        compare(ours, expected(model, prompt, 5))
    if deterministic:
        for first, second in zip(made_together[-2:], again, strict=True):
            assert all((a == b).all() for a, b in zip(first.logits, second.logits, strict=True))


def test_padding_never_leaks(tmp_path: Path) -> None:
    model = made(tmp_path, seed=7)
    llm = LLM(tmp_path, **PLAN, max_decode_buckets=1, max_extend_buckets=1)
    recorder = Recorder(llm)
    poison_every_step(llm)
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    for prompt, ours in zip(prompts, recorder.generate(prompts, 5), strict=True):
        compare(ours, expected(model, prompt, 5))


def test_without_rewrites_the_same_tokens(tmp_path: Path) -> None:
    model = made(tmp_path, seed=5)
    prompt = prompt_of(30, 131)
    (ours,) = Recorder(LLM(tmp_path, disabled_passes=tuple(REWRITES), **PLAN)).generate([prompt], 4)
    compare(ours, expected(model, prompt, 4))


@pytest.mark.parametrize("quant", ["fp8", "fp8_block", "int4"])
def test_quantizations_that_would_lose_biases_are_refused(quant: str, tmp_path: Path) -> None:
    made(tmp_path, intermediate_size=64)
    with pytest.raises(PlanError, match=r"gate_proj has a bias, which grouped_linear_\w+ does not take"):
        LLM(tmp_path, quant=quant, **PLAN)
