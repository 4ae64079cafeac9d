"""Qwen 1 against its own description in plain PyTorch, up to several times the tokens that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qwen1_reference import CONFIG, Qwen1, write
from reference import Recorder, compare, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.checkpoint import CheckpointError
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.models.family import UnsupportedModelError, build
from makeready.graphs.planner.compile import compile_plan

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "weight_dtype": "float32"}
# Within the trained length of 32, across it while generating, at it, behind it, behind twice and four times it.
LENGTHS = (1, 9, 28, 32, 33, 64, 65, 140)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dynamic_ntk": False},
        {"use_logn_attn": False},
        {"use_dynamic_ntk": False, "use_logn_attn": False, "no_bias": False},
        {"tie_word_embeddings": True, "num_hidden_layers": 1},
    ],
    ids=["released", "logn", "ntk", "neither-biased", "tied"],
)
def test_logits_and_tokens_equal_the_description(changes: dict[str, Any], tmp_path: Path) -> None:
    model = write(tmp_path, **changes)
    if changes.get("tie_word_embeddings"):
        model.tensors["lm_head.weight"] = model.tensors["transformer.wte.weight"]
        _without_head(tmp_path)
    recorder = Recorder(LLM(tmp_path, **PLAN))
    for length in LENGTHS:
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 8)
        compare(ours, model.generate(prompt, 8))


def _without_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")


def test_the_settings_tell(tmp_path: Path) -> None:
    """Where the two settings matter, and nowhere else: logn behind the trained length, the base for long prompts."""
    model = write(tmp_path)
    prompt = prompt_of(40, 131)
    plain = Qwen1(model.config | {"use_dynamic_ntk": False, "use_logn_attn": False}, model.tensors)
    assert model.logits(prompt[:32], 32).equal(plain.logits(prompt[:32], 32))
    one = Qwen1(model.config | {"use_dynamic_ntk": False}, model.tensors)
    assert (one.logits(prompt, 40) - plain.logits(prompt, 40))[32:].abs().max() > 1e-3
    assert (model.logits(prompt, 40) - one.logits(prompt, 40)).abs().max() > 1e-3
    assert [model.alpha(n) for n in (1, 32, 33, 64, 65, 128, 129)] == [1, 1, 3, 3, 7, 7, 15]


def test_prompts_of_different_bases_share_a_batch(tmp_path: Path) -> None:
    model = write(tmp_path, seed=2)
    prompts = [prompt_of(n, 131, seed=n) for n in (70, 5, 33, 32, 130, 8)]
    together = Recorder(LLM(tmp_path, **PLAN)).generate(prompts, 6)
    for prompt, ours in zip(prompts, together, strict=True):
        compare(ours, model.generate(prompt, 6))


def test_pages_of_another_base_are_not_shared(tmp_path: Path) -> None:
    """Prompts that begin alike but were turned by different bases, one after the other."""
    model = write(tmp_path, seed=3)
    recorder = Recorder(LLM(tmp_path, **PLAN))
    long = prompt_of(140, 131)
    for length in (24, 40, 32, 60, 40, 140, 30):
        (ours,) = recorder.generate([long[:length]], 4)
        compare(ours, model.generate(long[:length], 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_length": None}, "seq_length must be the tokens that the model was trained on"),
        ({"use_logn_attn": 1}, "use_logn_attn must be true or false"),
        ({"layer_norm_epsilon": 0}, "rms_norm_eps must be a positive number"),
    ],
)
def test_bad_configs_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        normalise_config(CONFIG | change)


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_pct": 0.25},
        {"scale_attn_weights": False},
        {"kv_channels": 8},
        {"use_cache_quantization": True},
    ],
)
def test_what_no_released_model_has_is_refused(change: dict[str, Any]) -> None:
    (field,) = change
    with pytest.raises(UnsupportedModelError, match=field):
        build(normalise_config(CONFIG | change), context_len=64, activation="float32")


def test_the_normal_form_is_one() -> None:
    found = normalise_config(CONFIG)
    assert normalise_config(found) == found
    assert (found["rms_norm_eps"], found["rope_parameters"]) == (
        1e-6,
        {"rope_type": "default", "rope_theta": 10000.0},
    )


def test_the_context_is_what_the_config_states(tmp_path: Path) -> None:
    write(tmp_path)
    assert compile_plan(tmp_path, max_rows=1).limits.context_len == 256
