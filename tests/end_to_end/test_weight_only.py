"""Weights of 4 and 8 bits against transformers models with the weights that they stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from int_models import IntFormat, quantize_ints, save_ints
from reference import Recorder, compare, expected, make_model, prompt_of

from makeready.engine.llm import LLM

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 8, "weight_dtype": "float32"}
# Two groups of 64 and half of a span; k and v have a whole tile of outputs.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "head_dim": 32,
    "initializer_range": 0.1,
}

FORMATS = {
    "awq": IntFormat("awq", group=64, zeros=True),
    "awq-32": IntFormat("awq", group=32, zeros=True),
    "awq-whole": IntFormat("awq", group=-1, zeros=True),
    "gptq": IntFormat("gptq", group=64),
    "gptq-zeros": IntFormat("gptq", group=64, zeros=True),
    "gptq-v2-zeros": IntFormat("gptq_v2", group=32, zeros=True),
    "gptq-8": IntFormat("gptq", bits=8, group=32),
    "gptq-8-zeros": IntFormat("gptq_v2", bits=8, group=-1, zeros=True),
    "gptq-whole": IntFormat("gptq", group=-1),
    "gptq-ordered": IntFormat("gptq", group=64, ordered=True),
    "gptq-8-ordered-zeros": IntFormat("gptq", bits=8, group=32, zeros=True, ordered=True),
    "gptq-whole-ordered": IntFormat("gptq", group=-1, ordered=True),
    "ct": IntFormat("compressed-tensors", group=64),
    "ct-zeros": IntFormat("compressed-tensors", group=32, zeros=True),
    "ct-channel": IntFormat("compressed-tensors", group=-1),
    "ct-8": IntFormat("compressed-tensors", bits=8, group=64),
    "ct-ordered": IntFormat("compressed-tensors", group=64, zeros=True, ordered=True),
}


def check(folder: Path, model: Any, **plan: Any) -> LLM:
    recorder = Recorder(LLM(folder, **{**PLAN, **plan}))
    for length in (1, 9, 30):
        prompt = prompt_of(length, model.config.vocab_size)
        (ours,) = recorder.generate([prompt], 5)
        compare(ours, expected(model, prompt, 5))
    return recorder.llm


@pytest.mark.parametrize("name", FORMATS)
def test_stored_formats(name: str, tmp_path: Path) -> None:
    family = ("llama", "qwen2", "qwen3")[[*FORMATS].index(name) % 3]
    model = make_model(tmp_path, family, **SMALL)
    save_ints(tmp_path, quantize_ints(model, FORMATS[name]), FORMATS[name])
    check(tmp_path, model)


def rounded(group: int = 128) -> IntFormat:
    return IntFormat("", group=group)


@pytest.mark.parametrize(("family", "deterministic"), [("qwen2", False), ("qwen3", True)])
def test_quantized_when_loaded(family: str, deterministic: bool, tmp_path: Path) -> None:
    """The last group of 192 inputs has 64."""
    model = make_model(tmp_path, family, **SMALL)
    quantize_ints(model, rounded())
    check(tmp_path, model, quant="int4", deterministic=deterministic)


def test_tied_embeddings_stay_wide(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama", tie_word_embeddings=True, **SMALL)
    quantize_ints(model, rounded())
    check(tmp_path, model, quant="int4")


@pytest.mark.parametrize("form", [FORMATS["awq"], FORMATS["gptq-8"], FORMATS["ct-zeros"], None], ids=str)
def test_experts(form: IntFormat | None, tmp_path: Path) -> None:
    config = {**SMALL, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = make_model(tmp_path, "qwen3_moe", **config)
    tensors = quantize_ints(model, form or rounded())
    if form is not None:
        said = {"modules_to_not_convert": ["mlp.gate"]} if form.tool == "awq" else {}
        said |= {"ignore": ["lm_head", "re:.*mlp.gate$"]} if form.tool == "compressed-tensors" else {}
        save_ints(tmp_path, tensors, form, **said)
    check(tmp_path, model, quant=None if form else "int4")


@pytest.mark.parametrize("form", [FORMATS["awq"], FORMATS["gptq-ordered"], None], ids=str)
def test_latent_attention(form: IntFormat | None, tmp_path: Path) -> None:
    """What makes keys and values of latents is widened while it is loaded, and stays as it is with quant=int4."""
    config = {**SMALL, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config |= {
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    }
    config |= {
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
    }
    config.pop("head_dim")
    model = make_model(tmp_path, "deepseek_v3", **config)
    tensors = quantize_ints(
        model, form or rounded(), ("lm_head", "mlp.gate", *([] if form else ["kv_b_proj"]))
    )
    if form is not None:
        save_ints(tmp_path, tensors, form)
    check(tmp_path, model, quant=None if form else "int4")


def test_a_head_and_layers_of_other_forms(tmp_path: Path) -> None:
    """GPTQ's lm_head, and dynamic rules: one module stays wide, those of a layer have 8 bits."""
    model = make_model(tmp_path, "llama", **{**SMALL, "vocab_size": 136})
    four, eight = FORMATS["gptq"], replace(FORMATS["gptq"], bits=8, group=32, zeros=True)
    down = "model.layers.0.mlp.down_proj"
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    second = tuple(name for name in names if ".layers.1." in name)
    tensors = quantize_ints(model, four, (down, *second))
    tensors |= quantize_ints(model, eight, tuple(name for name in names if name not in second))
    dynamic = {
        r"-:model\.layers\.0\.mlp\.down": {},
        r"+:model\.layers\.1\..*": {"bits": 8, "group_size": 32, "sym": False},
    }
    save_ints(tmp_path, tensors, four, lm_head=True, dynamic=dynamic)
    check(tmp_path, model)


def test_groups_of_compressed_tensors_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3", **SMALL)
    four, eight = FORMATS["ct"], replace(FORMATS["ct-8"], group=-1)
    mlps = tuple(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".mlp." in n)
    others = tuple(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".mlp." not in n)
    tensors = quantize_ints(model, four, (*mlps, "lm_head")) | quantize_ints(model, eight, others)
    groups = {
        "group_0": {**four.config()["config_groups"]["group_0"], "targets": [r"re:.*self_attn\..*_proj$"]},
        "group_1": {**eight.config()["config_groups"]["group_0"], "targets": ["Linear"]},
    }
    save_ints(tmp_path, tensors, four, config_groups=groups)
    check(tmp_path, model)


def test_deterministic(tmp_path: Path) -> None:
    """A request's logits are the same to the last bit, alone and beside others."""
    model = make_model(tmp_path, "qwen3", **SMALL)
    save_ints(tmp_path, quantize_ints(model, FORMATS["awq"]), FORMATS["awq"])
    prompts = [prompt_of(length, 131) for length in (1, 7, 30)]
    together = Recorder(LLM(tmp_path, **PLAN, deterministic=True)).generate(prompts, 4)
    for prompt, ours in zip(prompts, together, strict=True):
        (alone,) = Recorder(LLM(tmp_path, **PLAN, deterministic=True)).generate([prompt], 4)
        assert np.array_equal(alone.logits, ours.logits)
