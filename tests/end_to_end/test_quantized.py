"""8-bit linears against transformers models whose linears are simulated in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_models import Format, quantize_model, save_quantized
from reference import Generation, Recorder, expected, make_model, poison_every_step, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.passes import REWRITES

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "weight_dtype": "float32"}
QWEN3 = {"head_dim": 32, "intermediate_size": 96, "initializer_range": 0.1}
LLAMA = {"attention_bias": True, "mlp_bias": True, "initializer_range": 0.1}

FORMATS = {
    "fp8-block": Format("block", 32),
    # Hidden size 64, intermediate 96, heads of 16 or 32: what one block divides another does not.
    "fp8-block-beyond": Format("block", 40),
    "fp8-block-larger-than-all": Format("block", 128),
    "fp8-tensor": Format("tensor"),
    "fp8-tensor-static": Format("tensor", static=True),
    "ct-channel": Format("channel", tool="compressed-tensors"),
    "ct-channel-bf16-scales": Format("channel", tool="compressed-tensors", scale_dtype=torch.bfloat16),
    "ct-tensor": Format("tensor", tool="compressed-tensors"),
    "ct-tensor-static": Format("tensor", static=True, tool="compressed-tensors"),
    "int8-channel": Format("channel", tool="compressed-tensors", number="int"),
    "int8-channel-bf16-scales": Format(
        "channel", tool="compressed-tensors", number="int", scale_dtype=torch.bfloat16
    ),
    "int8-tensor-static": Format("tensor", static=True, tool="compressed-tensors", number="int"),
    "int8-channel-static": Format("channel", static=True, tool="compressed-tensors", number="int"),
    "ct-block": Format("block", 16, tool="compressed-tensors"),
    "ct-block-beyond": Format("block", 50, tool="compressed-tensors"),
}
ON_LOAD = (
    ("fp8", Format("channel")),
    ("fp8_block", Format("block", 128)),
    ("int8", Format("channel", number="int")),
)
LENGTHS = (1, 9, 30)


def compare(ours: Generation, theirs: Generation, plain: Generation) -> None:
    """Logits equal those simulated, and quantizing was not nothing.

    A difference in the last bit of fp32 sometimes moves an activation to the next 8-bit number, which
    changes logits by up to a few hundredths of the largest: hence two bounds. Tokens are compared up to the
    first that differs.
    """
    errors = []
    for at, (mine, other) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        if ours.tokens[:at] != theirs.tokens[:at]:
            break
        errors.append(np.abs(mine - other).max() / np.abs(other).max())
    assert max(errors) <= 8e-2, errors
    assert np.median(errors) <= 5e-4, errors
    first = np.abs(theirs.logits[0] - plain.logits[0]).max() / np.abs(plain.logits[0]).max()
    assert first >= 4 * max(errors[0], 5e-4), "the quantized model is as the wide one"


def check(folder: Path, model: Any, wide: Any, **plan: Any) -> None:
    recorder = Recorder(LLM(folder, **{**PLAN, **plan}))
    for length in LENGTHS:
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 5)
        compare(ours, expected(model, prompt, 5), expected(wide, prompt, 1))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", FORMATS)
def test_stored_formats(name: str, family: str, tmp_path: Path) -> None:
    config = QWEN3 if family == "qwen3" else LLAMA
    model, wide = (make_model(tmp_path, family, **config) for _ in range(2))
    save_quantized(tmp_path, quantize_model(model, FORMATS[name]), FORMATS[name])
    check(tmp_path, model, wide)


@pytest.mark.parametrize(("quant", "form"), ON_LOAD)
def test_quantized_when_loaded(quant: str, form: Format, tmp_path: Path) -> None:
    """With blocks k ends within one, so that q, k and v are not merged."""
    config = {**QWEN3, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model, wide = (make_model(tmp_path, "qwen3", **config) for _ in range(2))
    quantize_model(model, form)
    check(tmp_path, model, wide, quant=quant)


@pytest.mark.parametrize("disabled", [*((name,) for name in REWRITES), tuple(REWRITES)], ids="-".join)
def test_every_pass_on_or_off(disabled: tuple[str, ...], tmp_path: Path) -> None:
    form = FORMATS["fp8-tensor-static" if "fuse_qkv" in disabled else "fp8-block"]
    model, wide = (make_model(tmp_path, "llama", seed=5, **LLAMA) for _ in range(2))
    save_quantized(tmp_path, quantize_model(model, form), form)
    check(tmp_path, model, wide, disabled_passes=disabled)


def test_targets_and_ignored_modules(tmp_path: Path) -> None:
    """Two groups by pattern and by name, and one module of those left out: the others are as the file has them."""
    form = FORMATS["int8-channel"]
    model, wide = (make_model(tmp_path, "qwen3", **QWEN3) for _ in range(2))
    left = "model.layers.1.mlp.down_proj"

    def chosen(name: str) -> bool:
        return ("mlp" in name and name != left) or name == "model.layers.0.self_attn.o_proj"

    (group,) = form.config()["config_groups"].values()
    targets = (["re:.*mlp.*"], ["model.layers.0.self_attn.o_proj"])
    said = {
        "config_groups": {f"group_{at}": {**group, "targets": names} for at, names in enumerate(targets)},
        "ignore": ["lm_head", left],
    }
    save_quantized(tmp_path, quantize_model(model, form, chosen), form, **said)
    check(tmp_path, model, wide)


def test_tied_embeddings_stay_wide(tmp_path: Path) -> None:
    model, wide = (make_model(tmp_path, "qwen2", tie_word_embeddings=True, **LLAMA) for _ in range(2))
    quantize_model(model, Format("channel"))
    check(tmp_path, model, wide, quant="fp8")


def test_padding_never_leaks(tmp_path: Path) -> None:
    """With NaN in every byte that a step has not written itself, no bit of the logits changes."""
    model = make_model(tmp_path, "qwen3", **QWEN3)
    form = FORMATS["fp8-block"]
    save_quantized(tmp_path, quantize_model(model, form), form)
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]

    def generations(poison: bool) -> list[Generation]:
        llm = LLM(tmp_path, **PLAN, max_decode_buckets=1, max_extend_buckets=1)
        recorder = Recorder(llm)
        if poison:
            poison_every_step(llm)
        return recorder.generate(prompts, 4)

    for ours, theirs in zip(generations(True), generations(False), strict=True):
        assert ours.tokens == theirs.tokens
        assert np.isfinite(ours.logits).all()
        assert np.array_equal(ours.logits, theirs.logits)
