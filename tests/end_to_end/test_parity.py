"""Against transformers in fp32: logits and greedy tokens of tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.passes import REWRITES

PAGE = 8
PLAN: dict[str, Any] = {
    "max_rows": 4,
    "max_tokens": 24,
    "page_size": PAGE,
    "weight_dtype": "float32",
}
# One token, around a page, around a chunk, several chunks.
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 24, 25, 60)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "one-layer": ("llama", {"num_hidden_layers": 1, "vocab_size": 97}),
    "five-layers-mha": ("llama", {"num_hidden_layers": 5, "num_key_value_heads": 4}),
    "gqa-3-head-32": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32},
    ),
    "gqa-8-head-80": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 80}),
    "head-128-biased": ("llama", {"head_dim": 128, "attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True, "head_dim": 64}),
    "rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "rope-yarn": ("llama", {"rope_parameters": YARN}),
    "rope-yarn-mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5}}),
    "rope-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 32,
        },
    ),
    # Prompts beyond the positions before scaling: the scaled context is what may be used.
    "rope-linear-beyond": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
            "max_position_embeddings": 32,
        },
    ),
    "rope-yarn-beyond": (
        "qwen3",
        {
            "rope_parameters": {**YARN, "original_max_position_embeddings": 32},
            "max_position_embeddings": 40,  # Qwen3 states more positions than it scales from
            "head_dim": 32,
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 13}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-gqa-8": ("qwen3", {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1}),
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


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_batched_equals_alone(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, family, seed=3)
    prompts = [prompt_of(n, 131, seed=n) for n in (60, 1, 9, 24, 3, 40, 8, 17, 2)]
    together = Recorder(LLM(tmp_path, **PLAN)).generate(prompts, 10)
    for prompt, ours in zip(prompts, together, strict=True):
        compare(ours, expected(model, prompt, 10))


@pytest.mark.parametrize("disabled", [*((name,) for name in REWRITES), tuple(REWRITES)], ids="-".join)
def test_every_pass_on_or_off_gives_the_same_tokens(disabled: tuple[str, ...], tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3", seed=5, attention_bias=True)
    prompts = [prompt_of(n, 131, seed=n) for n in (30, 5, 9)]
    made = Recorder(LLM(tmp_path, disabled_passes=disabled, **PLAN)).generate(prompts, 6)
    for prompt, ours in zip(prompts, made, strict=True):
        compare(ours, expected(model, prompt, 6))


def test_padding_never_leaks(tmp_path: Path) -> None:
    """With NaN in every byte that a step has not written itself, tokens and logits stay the same."""
    model = make_model(tmp_path, "qwen3", seed=7)
    llm = LLM(tmp_path, **PLAN, max_decode_buckets=1, max_extend_buckets=1)
    recorder = Recorder(llm)
    poison_every_step(llm)
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    for prompt, ours in zip(prompts, recorder.generate(prompts, 6), strict=True):
        compare(ours, expected(model, prompt, 6))
