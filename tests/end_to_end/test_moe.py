"""Mixtures of experts against transformers in fp32, and DeepSeek-V1 against a plain reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepseek_reference
import gguf
import numpy as np
import pytest
from moe_models import gguf_file, quantize_mixture, stack
from quantized_models import Format, save_quantized
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of

from makeready.engine.llm import LLM
from makeready.graphs.passes import REWRITES

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


def test_300_tokens_in_one_step(tmp_path: Path) -> None:
    family, config = MODELS["qwen3-128"]
    model = make_model(tmp_path, family, **config, max_position_embeddings=512)
    prompt = prompt_of(300, 131)
    (ours,) = Recorder(LLM(tmp_path, **(PLAN | {"max_tokens": 320}))).generate([prompt], 4)
    compare(ours, expected(model, prompt, 4))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mixtral"])
def test_routers_that_cannot_decide(name: str, tmp_path: Path) -> None:
    """All experts tie for every token, so that all tokens have the same few and the others none.

    Which those are is not defined where torch chooses: experts are alike.
    """
    family, config = MODELS[name]
    model = make_model(tmp_path, family, **config)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
        for stacked in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            stacked.data.copy_(stacked.data[:1].clone().expand_as(stacked))
    model.save_pretrained(tmp_path)
    prompt = prompt_of(63, 131)
    (ours,) = Recorder(LLM(tmp_path, **PLAN)).generate([prompt], 4)
    compare(ours, expected(model, prompt, 4))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True, "first_k_dense_replace": 0, "n_routed_experts": 5, "num_experts_per_tok": 1},
        {"n_shared_experts": None, "moe_layer_freq": 2, "num_key_value_heads": 4},
    ],
    ids=["released", "renormalised", "no-shared"],
)
def test_deepseek_equals_its_description(changes: dict[str, Any], tmp_path: Path) -> None:
    model = deepseek_reference.write(tmp_path, **changes)
    recorder = Recorder(LLM(tmp_path, **PLAN))
    for length in (1, 63, 65):
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 5)
        compare(ours, model.generate(prompt, 5))


@pytest.mark.parametrize("deterministic", [False, True])
def test_batched_equals_alone(deterministic: bool, tmp_path: Path) -> None:
    family, config = MODELS["qwen2-60"]
    model = make_model(tmp_path, family, seed=3, **config)
    prompts = [prompt_of(n, 131, seed=n) for n in (60, 1, 9, 24, 3, 40, 8, 17, 2)]
    together = Recorder(LLM(tmp_path, **PLAN, deterministic=deterministic)).generate(prompts, 6)
    for prompt, ours in zip(prompts, together, strict=True):
        compare(ours, expected(model, prompt, 6))


def test_padding_never_leaks(tmp_path: Path) -> None:
    """With NaN in every byte that a step has not written itself: padding tokens go to no expert."""
    model = make_model(tmp_path, "qwen2_moe", seed=7, **MODELS["qwen2"][1])
    llm = LLM(tmp_path, **PLAN, max_decode_buckets=1, max_extend_buckets=1)
    recorder = Recorder(llm)
    poison_every_step(llm)
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    for prompt, ours in zip(prompts, recorder.generate(prompts, 6), strict=True):
        compare(ours, expected(model, prompt, 6))


@pytest.mark.parametrize("disabled", [*((name,) for name in REWRITES), tuple(REWRITES)], ids="-".join)
def test_every_pass_on_or_off_gives_the_same_tokens(disabled: tuple[str, ...], tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen2_moe", seed=5, **MODELS["qwen2"][1])
    prompts = [prompt_of(n, 131, seed=n) for n in (30, 5)]
    made = Recorder(LLM(tmp_path, disabled_passes=disabled, **PLAN)).generate(prompts, 4)
    for prompt, ours in zip(prompts, made, strict=True):
        compare(ours, expected(model, prompt, 4))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mixtral"])
def test_stacked_experts_give_the_same(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    model = make_model(tmp_path, family, **config)
    stack(tmp_path)
    prompt = prompt_of(30, 131)
    (ours,) = Recorder(LLM(tmp_path, **PLAN)).generate([prompt], 5)
    compare(ours, expected(model, prompt, 5))


@pytest.mark.parametrize(
    ("name", "architecture"), [("qwen2", "qwen2moe"), ("qwen3", "qwen3moe"), ("mixtral", "llama")]
)
def test_gguf_files_give_the_same(name: str, architecture: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    # GGUF does not say whether weights are divided by their sum: llama.cpp knows it by the architecture.
    own = {} if name == "mixtral" else {"norm_topk_prob": name == "qwen3"}
    model = make_model(tmp_path, family, **(config | own))
    prompt = prompt_of(30, 131)
    (ours,) = Recorder(LLM(gguf_file(tmp_path, architecture), **PLAN)).generate([prompt], 5)
    compare(ours, expected(model, prompt, 5))


def test_a_gguf_file_of_deepseek_gives_the_same(tmp_path: Path) -> None:
    model = deepseek_reference.write(tmp_path)
    prompt = prompt_of(30, 131)
    (ours,) = Recorder(LLM(gguf_file(tmp_path, "deepseek"), **PLAN)).generate([prompt], 5)
    compare(ours, model.generate(prompt, 5))


def test_stacked_blocks_of_gguf_are_the_right_experts(tmp_path: Path) -> None:
    """In Q8_0, an expert's rows begin within the stacked tensor; the model is changed to what the blocks hold."""
    config = MODELS["qwen3"][1] | {"moe_intermediate_size": 32}
    model = make_model(tmp_path, "qwen3_moe", **config)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = gguf_file(tmp_path, "qwen3moe", kind)
    for layer in model.model.layers:
        for parameter in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            values = parameter.detach().numpy()
            parameter.data.copy_(
                parameter.new_tensor(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind))
            )
    prompt = prompt_of(30, 131)
    (ours,) = Recorder(LLM(path, **PLAN)).generate([prompt], 5)
    compare(ours, expected(model, prompt, 5))


QUANTIZED = {
    "fp8-block": Format("block", 32),
    "fp8-tensor": Format("tensor"),
    "ct-channel": Format("channel", tool="compressed-tensors"),
    "int8": Format("channel", tool="compressed-tensors", number="int"),
    "ct-block": Format("block", 16, tool="compressed-tensors"),
}
QWEN3 = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}


@pytest.mark.parametrize("stacked", [False, True], ids=["single", "stacked"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_stored_8_bit_experts(name: str, stacked: bool, tmp_path: Path) -> None:
    form = QUANTIZED[name]
    if stacked and form.weights == "tensor":
        pytest.skip("one number an expert is stacked in no known file")
    config = QWEN3 | {"initializer_range": 0.1}
    model, wide = (make_model(tmp_path, "qwen3_moe", **config) for _ in range(2))
    save_quantized(tmp_path, quantize_mixture(model, form), form)
    if stacked:
        stack(tmp_path)
    check_quantized(tmp_path, model, wide)


@pytest.mark.parametrize(
    ("quant", "form"),
    [
        ("fp8", Format("channel")),
        ("fp8_block", Format("block", 128)),
        ("int8", Format("channel", number="int")),
    ],
)
def test_experts_quantized_when_loaded(quant: str, form: Format, tmp_path: Path) -> None:
    config = QWEN3 | {"initializer_range": 0.1, "hidden_size": 128, "moe_intermediate_size": 128}
    model, wide = (make_model(tmp_path, "qwen3_moe", **config) for _ in range(2))
    quantize_mixture(model, form)
    check_quantized(tmp_path, model, wide, quant=quant)


def check_quantized(folder: Path, model: Any, wide: Any, **plan: Any) -> None:
    """Logits equal those simulated, but where a last bit of fp32 moved an activation to the next 8-bit number,
    which a sequence keeps in its cache: hence a bound for most tokens of all prompts and one for all.
    """
    recorder = Recorder(LLM(folder, **{**PLAN, **plan}))
    errors, changes = [], []
    for length in (1, 9, 30):
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 5)
        theirs, plain = expected(model, prompt, 5), expected(wide, prompt, 1)
        for at, (mine, other) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            if ours.tokens[:at] == theirs.tokens[:at]:
                errors.append(np.abs(mine - other).max() / np.abs(other).max())
        changes.append(np.abs(theirs.logits[0] - plain.logits[0]).max() / np.abs(plain.logits[0]).max())
    assert max(errors) <= 8e-2, errors
    assert np.median(errors) <= 5e-4, errors
    assert min(changes) >= 2e-3, "the quantized model is as the wide one"
