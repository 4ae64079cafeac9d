"""gpt-oss against transformers in fp32: sinks, alternating windows, biases, clamped SwiGLU, YaRN, MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Recorder, compare, expected, make_model, poison_every_step, prompt_of
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

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
    "as-released": {
        "num_local_experts": 32,
        "num_hidden_layers": 3,
        "sliding_window": 128,
        "max_position_embeddings": 512,
    },
    "narrow-window": {
        "sliding_window": 2,
        "num_hidden_layers": 3,
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
    },
    "own-layers": {"layer_types": ["full_attention"] * 2, "num_attention_heads": 8, "head_dim": 16},
    "truncated": {"rope_parameters": {**YARN, "truncate": True, "original_max_position_embeddings": 16}},
}


def made(folder: Path, seed: int = 0, **config: Any) -> Any:
    """A model whose sinks lie among scores: without them logits change by a tenth and more."""
    model = make_model(folder, "gpt_oss", seed=seed, **{**SMALL, **config})
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=1.0, std=2.0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "name", [*MODELS][:3] + [pytest.param(name, marks=pytest.mark.slow) for name in [*MODELS][3:]]
)
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


def as_mxfp4(folder: Path, model: Any) -> None:
    """Rewrite the checkpoint in ``folder`` with experts as the released files have them, and ``model`` to what these
    bits stand for: random numbers of 4 bits under random scales, made wide by transformers.
    """
    file, random = folder / "model.safetensors", torch.Generator().manual_seed(5)
    tensors = load_file(file)
    for i, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            at, wide = f"model.layers.{i}.mlp.experts.{name}", getattr(layer.mlp.experts, name)
            experts, inputs, outputs = wide.shape
            shape = (experts, outputs, inputs // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
            scales = torch.randint(122, 126, shape, dtype=torch.uint8, generator=random)
            del tensors[at]
            tensors |= {f"{at}_blocks": blocks, f"{at}_scales": scales}
            wide.data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


BLOCKS: dict[str, dict[str, Any]] = {
    "one-block": {"hidden_size": 64, "intermediate_size": 32},
    "odd-spans": {
        "hidden_size": 192,
        "intermediate_size": 160,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
    },
}


@pytest.mark.parametrize(("name", "deterministic"), [("one-block", False), ("odd-spans", True)])
def test_mxfp4_equals_what_transformers_makes_wide(name: str, deterministic: bool, tmp_path: Path) -> None:
    model = made(tmp_path, **BLOCKS[name])
    as_mxfp4(tmp_path, model)
    llm = LLM(tmp_path, **PLAN, deterministic=deterministic)
    recorder = Recorder(llm)
    for length in (1, 65):
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 5)
        compare(ours, expected(model, prompt, 5))
    stored = {w.param.spec.dtype for w in llm.engine.executable.plan.weights if "gate_up" in w.param.name}
    assert stored == {"int16", "uint8", "float32"}, "experts stay packed"


def test_experts_that_are_not_converted(tmp_path: Path) -> None:
    """One layer's stay wide, as ``modules_to_not_convert`` says."""
    model = made(tmp_path, hidden_size=64, intermediate_size=64)
    wide = load_file(tmp_path / "model.safetensors")
    as_mxfp4(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        at = f"model.layers.1.mlp.experts.{name}"
        del tensors[f"{at}_blocks"], tensors[f"{at}_scales"]
        tensors[at] = wide[at]
        getattr(model.model.layers[1].mlp.experts, name).data.copy_(wide[at])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append("model.layers.1.mlp")
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = prompt_of(30, 131)
    (ours,) = Recorder(LLM(tmp_path, **PLAN)).generate([prompt], 4)
    compare(ours, expected(model, prompt, 4))
