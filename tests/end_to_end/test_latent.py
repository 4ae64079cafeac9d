"""DeepSeek-V2 and V3 against transformers in fp32: latent attention and their mixtures of experts."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from latent_gguf import latent_gguf
from moe_models import quantize_mixture, stack
from quantized_models import Format, save_quantized
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of
from safetensors.torch import load_file, save_file

from makeready.engine.llm import LLM
from makeready.graphs.checkpoint.base import CheckpointWarning
from makeready.graphs.passes import REWRITES

PAGE = 7
PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": PAGE, "weight_dtype": "float32"}
# One token, around a page, around a chunk, several chunks.
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 24, 25, 60)
LATENT: dict[str, Any] = {
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "kv_lora_rank": 24,
    "q_lora_rank": 28,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
GROUPS = {"n_group": 4, "topk_group": 2}
LIMITED = {**GROUPS, "topk_method": "group_limited_greedy"}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # with a page size
    "v2-lite": ("deepseek_v2", {"q_lora_rank": None, "n_shared_experts": 2}, PAGE),
    "v2": ("deepseek_v2", {**LIMITED, "routed_scaling_factor": 3.0, "rope_parameters": YARN}, 1),
    "v2-one-head": (
        "deepseek_v2",
        {"num_attention_heads": 1, "attention_bias": True, "qk_rope_head_dim": 2, "first_k_dense_replace": 0},
        64,
    ),
    "v3": ("deepseek_v3", {**GROUPS, "num_attention_heads": 16, "rope_parameters": YARN}, PAGE),
    "v3-three-heads": (
        "deepseek_v3",
        {
            "hidden_size": 72,
            "num_attention_heads": 3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
            "num_hidden_layers": 3,
        },
        64,
    ),
    "v3-no-q-rank": ("deepseek_v3", {**GROUPS, "q_lora_rank": None, "num_experts_per_tok": 1}, 1),
}


def make(folder: Path, name: str, **changes: Any) -> Any:
    family, config, _ = MODELS[name]
    made = LATENT | config | changes
    return make_model(folder, family, num_key_value_heads=made.get("num_attention_heads", 4), **made)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make(tmp_path, name)
    recorder = Recorder(LLM(tmp_path, **(PLAN | {"page_size": MODELS[name][2]})))
    for length in LENGTHS:
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 8)
        compare(ours, expected(model, prompt, 8))


@pytest.mark.parametrize("deterministic", [False, True])
def test_batched_with_shared_prefixes_equals_alone(deterministic: bool, tmp_path: Path) -> None:
    """Prompts that begin alike, the second time with all that the first left in the cache."""
    model = make(tmp_path, "v3")
    stem = prompt_of(40, 131)
    prompts = [[*stem[:n], *prompt_of(5, 131, seed=n)] for n in (35, 34, 0, 21, 40, 7, 1)]
    llm = LLM(tmp_path, **PLAN, deterministic=deterministic)
    recorder = Recorder(llm)
    wanted = [expected(model, prompt, 6) for prompt in prompts]
    for _ in range(2):
        for ours, theirs in zip(recorder.generate(prompts, 6), wanted, strict=True):
            compare(ours, theirs)
    again = llm.generate(token_ids=prompts[:1])[0]
    assert again.meta_info["cached_tokens"] == 35


def test_padding_never_leaks(tmp_path: Path) -> None:
    """With NaN in every byte that a step has not written itself."""
    model = make(tmp_path, "v2")
    llm = LLM(tmp_path, **PLAN, max_decode_buckets=1, max_extend_buckets=1)
    recorder = Recorder(llm)
    poison_every_step(llm)
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    for prompt, ours in zip(prompts, recorder.generate(prompts, 6), strict=True):
        compare(ours, expected(model, prompt, 6))


@pytest.mark.parametrize(
    "disabled", [("merge_linears",), ("hoist_gather",), tuple(REWRITES)], ids=["merge", "hoist", "all"]
)
def test_every_pass_on_or_off_gives_the_same_tokens(disabled: tuple[str, ...], tmp_path: Path) -> None:
    model = make(tmp_path, "v3")
    prompts = [prompt_of(n, 131, seed=n) for n in (30, 5)]
    made = Recorder(LLM(tmp_path, disabled_passes=disabled, **PLAN)).generate(prompts, 4)
    for prompt, ours in zip(prompts, made, strict=True):
        compare(ours, expected(model, prompt, 4))


@pytest.mark.parametrize("name", ["v2", "v3"])
def test_stacked_experts_and_layers_that_predict_further(name: str, tmp_path: Path) -> None:
    model = make(tmp_path, name)
    stack(tmp_path)
    file = tmp_path / "model.safetensors"
    further = {"model.layers.2.eh_proj.weight": torch.ones(64, 128)} if name == "v3" else {}
    save_file(load_file(file) | further, file)
    prompt = prompt_of(30, 131)
    told = pytest.warns(CheckpointWarning, match="they predict further tokens") if further else nullcontext()
    with told:
        llm = LLM(tmp_path, **PLAN)
    (ours,) = Recorder(llm).generate([prompt], 5)
    compare(ours, expected(model, prompt, 5))


QUANTIZED = {
    "fp8-block": Format("block", 32),
    "fp8-block-larger": Format("block", 128),
    "fp8-tensor": Format("tensor"),
    "ct-channel": Format("channel", tool="compressed-tensors"),
    "int8": Format("channel", tool="compressed-tensors", number="int"),
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("family", ["v2-lite", "v3"])
def test_stored_8_bit_weights(name: str, family: str, tmp_path: Path) -> None:
    """What makes keys and values of latents is stored in 8 bits like all else, and made wide when it is loaded."""
    sizes = {"initializer_range": 0.1, "moe_intermediate_size": 128}
    model, wide = (make(tmp_path, family, **sizes) for _ in range(2))
    save_quantized(tmp_path, quantize(model, QUANTIZED[name]), QUANTIZED[name])
    check_quantized(tmp_path, model, wide)


@pytest.mark.parametrize(
    ("quant", "form"),
    [
        ("fp8", Format("channel")),
        ("fp8_block", Format("block", 128)),
        ("int8", Format("channel", number="int")),
    ],
)
def test_quantized_when_loaded(quant: str, form: Format, tmp_path: Path) -> None:
    """With dense layers, latents and heads that are no whole blocks."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 192}
    model, wide = (make(tmp_path, "v3", initializer_range=0.1, **sizes) for _ in range(2))
    quantize(model, form, stored=False)
    check_quantized(tmp_path, model, wide, quant=quant)


def quantize(model: Any, form: Format, *, stored: bool = True) -> dict[str, torch.Tensor]:
    """Quantize the model in place; what makes keys and values of latents multiplies wide activations.

    Args:
        stored: whether it is quantized as well, to what a checkpoint holds.
    """
    attentions = [layer.self_attn for layer in model.model.layers]
    plain = [attention.kv_b_proj for attention in attentions]
    tensors = quantize_mixture(model, form)
    for attention, linear in zip(attentions, plain, strict=True):
        if stored:
            linear.weight.data.copy_(attention.kv_b_proj.wide)
        attention.kv_b_proj = linear
    return tensors


def check_quantized(folder: Path, model: Any, wide: Any, **plan: Any) -> None:
    """As for other mixtures (test_moe.py): a last bit of fp32 may move an activation to the next 8-bit number, which
    in a long prompt happens to some token.
    """
    recorder = Recorder(LLM(folder, **{**PLAN, **plan}))
    errors, changes = [], []
    for length in (1, 4, 6, 9):
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 5)
        theirs, plain = expected(model, prompt, 5), expected(wide, prompt, 1)
        for at, (mine, other) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
            if ours.tokens[:at] == theirs.tokens[:at]:
                errors.append(np.abs(mine - other).max() / np.abs(other).max())
        changes.append(np.abs(theirs.logits[0] - plain.logits[0]).max() / np.abs(plain.logits[0]).max())
    assert max(errors) <= 8e-2, errors
    assert np.median(errors) <= 5e-6, errors
    assert min(changes) >= 2e-3, "the quantized model is as the wide one"


def test_an_8_bit_cache_is_near(tmp_path: Path) -> None:
    """Latents in 8 bits without a scale: near the wide ones, and not the same."""
    model = make(tmp_path, "v2-lite", initializer_range=0.1)
    recorder = Recorder(LLM(tmp_path, **PLAN, kv_dtype="float8_e4m3fn"))
    prompt = prompt_of(30, 131)
    (ours,), theirs = recorder.generate([prompt], 1), expected(model, prompt, 1)
    error = np.abs(ours.logits[0] - theirs.logits[0]).max() / np.abs(theirs.logits[0]).max()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("split", [False, True], ids=["one", "split"])
@pytest.mark.parametrize("name", ["v2-lite", "v2", "v3"])
def test_gguf_files_give_the_same(name: str, split: bool, tmp_path: Path) -> None:
    model = make(tmp_path, name)
    prompt = prompt_of(30, 131)
    llm = LLM(latent_gguf(tmp_path, split=split), **PLAN)
    (ours,) = Recorder(llm).generate([prompt], 5)
    compare(ours, expected(model, prompt, 5))
    assert llm.plan.architecture == f"DeepseekV{3 if name == 'v3' else 2}ForCausalLM"


def test_gguf_files_that_do_not_say_how_scores_are_scaled(tmp_path: Path) -> None:
    """YaRN without DeepSeek's factors, and without its own: rotary rows keep their size."""
    rope = {k: v for k, v in YARN.items() if not k.startswith("mscale")}
    model = make(tmp_path, "v2", rope_parameters={**rope, "attention_factor": 1.0})
    prompt = prompt_of(30, 131)
    path = latent_gguf(tmp_path, split=False, log_multiplier=False)
    (ours,) = Recorder(LLM(path, **PLAN)).generate([prompt], 5)
    compare(ours, expected(model, prompt, 5))


def test_blocks_of_gguf_are_put_together(tmp_path: Path) -> None:
    """Keys' matrices of every head are stored transposed, in Q8_0; the model is changed to what the blocks hold."""
    sizes = {"qk_nope_head_dim": 32, "kv_lora_rank": 64, "q_lora_rank": 32, "v_head_dim": 16}
    model = make(tmp_path, "v3", num_attention_heads=4, **sizes)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = latent_gguf(tmp_path, split=True, quantized=kind)

    def rounded(values: np.ndarray) -> np.ndarray:
        return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(values), kind), kind)

    for layer in model.model.layers:
        for name, weight in layer.self_attn.named_parameters():
            if weight.dim() == 1:
                continue
            values = weight.detach().numpy()
            if name == "kv_b_proj.weight":
                of_head = values.reshape(4, 48, 64)
                keys = rounded(of_head[:, :32].transpose(0, 2, 1)).transpose(0, 2, 1)
                values = np.concatenate((keys, rounded(of_head[:, 32:])), 1).reshape(values.shape)
            else:
                values = rounded(values)
            weight.data.copy_(weight.new_tensor(values))
    prompt = prompt_of(30, 131)
    (ours,) = Recorder(LLM(path, **PLAN)).generate([prompt], 5)
    compare(ours, expected(model, prompt, 5))
