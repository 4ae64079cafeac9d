"""Gemma 3 text against transformers in fp32: tiny random models as safetensors and GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Recorder, compare, expected, make_model, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.models.family import UnsupportedModelError, build
from makeready.graphs.passes import REWRITES

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "weight_dtype": "float32"}
LENGTHS = (1, 7, 8, 9, 24, 25, 60)
TINY: dict[str, Any] = {
    "num_hidden_layers": 7,  # five that slide, one that does not, and one more
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 11,
    "hidden_size": 60,  # whose root is no whole number
}

MODELS: dict[str, dict[str, Any]] = {
    "as-released": {},
    "head-256": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
    },
    "untied-biased": {"tie_word_embeddings": False, "attention_bias": True, "num_hidden_layers": 2},
    "scaled": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "other-pattern": {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, "gemma3", **(TINY | MODELS[name]))
    recorder = Recorder(LLM(tmp_path, **PLAN))
    for length in LENGTHS:
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 6)
        compare(ours, expected(model, prompt, 6))


def test_batched_equals_alone(tmp_path: Path) -> None:
    model = make_model(tmp_path, "gemma3", seed=3, **TINY)
    prompts = [prompt_of(n, 131, seed=n) for n in (60, 1, 9, 24, 3, 40)]
    together = Recorder(LLM(tmp_path, **PLAN)).generate(prompts, 6)
    for prompt, ours in zip(prompts, together, strict=True):
        compare(ours, expected(model, prompt, 6))


@pytest.mark.parametrize(
    "disabled", [("fuse_silu_mul",), ("fuse_add_norm", "fuse_qkv"), tuple(REWRITES)], ids="-".join
)
def test_passes_off_give_the_same_tokens(disabled: tuple[str, ...], tmp_path: Path) -> None:
    model = make_model(tmp_path, "gemma3", seed=5, **TINY)
    prompts = [prompt_of(n, 131, seed=n) for n in (30, 5)]
    made = Recorder(LLM(tmp_path, disabled_passes=disabled, **PLAN)).generate(prompts, 4)
    for prompt, ours in zip(prompts, made, strict=True):
        compare(ours, expected(model, prompt, 4))


def test_every_pass_finds_its_place(tmp_path: Path) -> None:
    """The gate, both residual additions and all between projection and attention are fused as for other models."""
    from makeready.graphs.compile import Request, trace_checkpoint

    make_model(tmp_path, "gemma3", **TINY)
    lowered = trace_checkpoint(tmp_path, Request(max_rows=2)).lower()
    ops = [call.op for call in lowered.programs["decode"].calls]
    layers = TINY["num_hidden_layers"]
    assert ops.count("gelu_tanh_mul") == ops.count("norm_rope_kv_write") == layers
    assert ops.count("add_rms_norm") == 2 * layers
    assert ops.count("rms_norm") == 2 * layers + 1
    assert ops.count("rope_rows") == 2
    assert not {"add", "gelu_tanh", "multiply", "rope", "head_rms_norm"} & set(ops)


def test_the_embedding_scale_is_rounded_as_transformers_rounds_it() -> None:
    raw = {"model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 640, "intermediate_size": 8}
    config = normalise_config(
        raw | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1}
    )
    for name in ("float32", "bfloat16", "float16"):
        made: Any = build(config, context_len=16, activation=name)
        assert made.embedding_scale == torch.tensor(640**0.5).to(getattr(torch, name)).item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ({"hidden_activation": "relu"}, "hidden_act 'relu' is not supported"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], message: str) -> None:
    raw = {"model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 64, "intermediate_size": 8}
    config = normalise_config(raw | {"num_hidden_layers": 1, "num_attention_heads": 4} | change)
    with pytest.raises(UnsupportedModelError, match=message):
        build(config, context_len=16, activation="float32")
