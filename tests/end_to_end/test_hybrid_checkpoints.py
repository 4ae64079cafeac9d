"""Checkpoints of hybrids: quantized, of models that see as well, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import test_quantized
import torch
import transformers
from hybrids import MODELS, MOE, NET, PLAN, model_of
from quantized_models import Format, quantize_model, save_quantized
from reference import Recorder, compare, expected, make_model, prompt_of
from safetensors.torch import load_file, save_file

from makeready.engine.llm import LLM
from makeready.graphs.checkpoint.base import CheckpointError, CheckpointWarning, open_checkpoint
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.executable.cpu.weights import assemble
from makeready.graphs.models.family import UnsupportedModelError, build
from makeready.graphs.plan.plan import PlanError

WHOLE = {"linear_key_head_dim": 32, "linear_value_head_dim": 16, "head_dim": 32, "initializer_range": 0.1}
SMALL = "linear_attn.in_proj_ba"  # which published checkpoints leave wide


@pytest.mark.parametrize(
    "form",
    [
        Format("block", 32),
        Format("tensor"),
        Format("channel", tool="compressed-tensors"),
        Format("channel", tool="compressed-tensors", number="int"),
    ],
    ids=lambda form: f"{form.number}-{form.weights}",
)
def test_stored_in_8_bits(form: Format, tmp_path: Path) -> None:
    """Rows of queries, keys, values and gates are taken apart, and so are their scales: no number is off."""
    model, config = model_of(tmp_path, "next-dense", **WHOLE), WHOLE | NET | WHOLE
    said = {"ignore" if form.tool != "fp8" else "modules_to_not_convert": ["lm_head", f"re:.*{SMALL}"]}
    save_quantized(tmp_path, quantize_model(model, form, lambda name: SMALL not in name), form, **said)
    llm = LLM(tmp_path, **PLAN)
    checkpoint = open_checkpoint(tmp_path)
    params = {weight.param.name.partition("@")[0]: weight.param for weight in llm.plan.weights}
    found = 0
    for name in [name for name in params if f"{name}_scale" in params]:
        sources = {piece.source.removesuffix(".weight") for piece in params[name].pieces}
        modules = {source.rpartition(".")[2]: model.get_submodule(source) for source in sources}
        if not {"in_proj_qkvz", "q_proj"} & modules.keys():
            continue
        weight, scale = (loaded(params[n], checkpoint) for n in (name, f"{name}_scale"))
        if form.block:
            scale = scale.repeat_interleave(form.block, 0).repeat_interleave(form.block, 1)
        made = weight * (scale if form.block else scale[:, None])
        if "in_proj_qkvz" in modules:
            keys, own = config["linear_key_head_dim"], 2 * config["linear_value_head_dim"]
            parts = modules["in_proj_qkvz"].wide.view(2, -1, 64).split((keys, keys, own, own), dim=1)
            wanted = torch.cat([part.reshape(-1, 64) for part in parts])
        else:
            queries, gates = modules["q_proj"].wide.view(4, 2, -1, 64).unbind(1)
            others = [modules[f"{n}_proj"].wide for n in "kv"]
            wanted = torch.cat([queries.reshape(-1, 64), *others, gates.reshape(-1, 64)])
        assert torch.equal(made, wanted)
        found += 1
    assert found == 4
    near(Recorder(llm), model)


def loaded(param: Any, checkpoint: Any) -> torch.Tensor:
    """A parameter as its recipe says."""
    made = torch.empty(param.spec.shape, dtype=getattr(torch, param.spec.dtype))
    assemble(param.operands[0], checkpoint, made)
    return made.double()


def near(recorder: Recorder, model: Any) -> None:
    """Where a sum differs in its last bit, an activation may be another 8-bit number: logits are as near as that."""
    prompt = prompt_of(30, 131)
    (ours,), theirs = recorder.generate([prompt], 1), expected(model, prompt, 1)
    assert abs(ours.logits[0] - theirs.logits[0]).max() <= 0.12 * abs(theirs.logits[0]).max()


@pytest.mark.parametrize(("quant", "form"), test_quantized.ON_LOAD)
def test_quantized_when_loaded(quant: str, form: Format, tmp_path: Path) -> None:
    """Blocks of 128 rows are the same in the order that the checkpoint has and in that in which rows are used."""
    sizes = WHOLE | {"hidden_size": 128, "intermediate_size": 256, "linear_value_head_dim": 64}
    sizes |= {"linear_key_head_dim": 128, "head_dim": 128, "num_hidden_layers": 2}
    sizes |= {"layer_types": ["linear_attention", "full_attention"]}
    model = model_of(tmp_path, "next-dense", **sizes)
    quantize_model(model, form, lambda name: SMALL not in name)
    recorder = Recorder(LLM(tmp_path, **PLAN, quant=quant))
    assert any("_scale" in weight.param.name for weight in recorder.llm.plan.weights)
    near(recorder, model)


def test_a_head_that_ends_within_a_block_is_refused(tmp_path: Path) -> None:
    model, form = model_of(tmp_path, "next-dense", **WHOLE), Format("block", 24)
    said = {"modules_to_not_convert": ["lm_head", f"re:.*{SMALL}"]}
    save_quantized(tmp_path, quantize_model(model, form, lambda name: SMALL not in name), form, **said)
    with pytest.raises(PlanError, match="begins within a block of 24"):
        LLM(tmp_path, **PLAN)


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}


@pytest.mark.parametrize("name", ["3.5", "3.5-moe"])
def test_the_text_model_of_one_that_sees(name: str, tmp_path: Path) -> None:
    """Its config is within another, its tensors have longer names; what sees or predicts further is left out."""
    family, config = MODELS[name]
    text = make_model(tmp_path / "text", family, **(NET | config)).config.to_dict()
    made, kind = {
        "3.5": (transformers.Qwen3_5ForConditionalGeneration, transformers.Qwen3_5Config),
        "3.5-moe": (transformers.Qwen3_5MoeForConditionalGeneration, transformers.Qwen3_5MoeConfig),
    }[name]
    torch.manual_seed(0)
    whole = kind(text_config=text, vision_config=VISION, tie_word_embeddings=text["tie_word_embeddings"])
    model = made(whole).eval()
    folder = tmp_path / "whole"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("model.visual.") for name in tensors)
    stacked = [key for key in tensors if key.endswith("experts.0.gate_proj.weight")]
    for key in stacked:  # as published checkpoints have them
        layer, experts = key.removesuffix("0.gate_proj.weight"), range(MOE["num_experts"])
        gate, up, down = (
            torch.stack([tensors.pop(f"{layer}{e}.{part}_proj.weight") for e in experts])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{layer}gate_up_proj": torch.cat((gate, up), 1), f"{layer}down_proj": down}
    assert (len(stacked) == 4) == (name == "3.5-moe")
    further = {"mtp.norm.weight": torch.ones(64), "mtp.layers.0.mlp.gate.weight": torch.ones(2, 64)}
    save_file({**tensors, **further}, folder / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recorder = Recorder(LLM(folder, **PLAN))
    said = {str(w.message) for w in told if issubclass(w.category, CheckpointWarning)}
    assert any("see images and videos, which is not done here" in one for one in said)
    assert any("predict further tokens" in one for one in said)
    assert len(said) == 2
    for length in (1, 24, 90):
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 4)
        compare(ours, expected(model, prompt, 4))


def test_names_within_a_quantization_config_are_those_of_the_text_model(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3_5", **NET)
    text = model.config.to_dict()
    ignored = ["model.language_model.layers.0.linear_attn", r"re:model\.language_model\.layers\.1", "lm_head"]
    quantization = {"quant_method": "fp8", "modules_to_not_convert": ignored}
    whole = {"model_type": "qwen3_5", "text_config": text, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    found = open_checkpoint(tmp_path).config
    assert found["quantization_config"]["modules_to_not_convert"] == [
        "model.layers.0.linear_attn",
        r"re:model\.layers\.1",
        "lm_head",
    ]
    assert found["architectures"] == ["Qwen3_5ForCausalLM"]
    assert "partial_rotary_factor" not in found
    assert found["rope_parameters"]["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize("partial", [1.0, 0.5, None])
def test_a_normalised_config_is_normal(partial: float | None) -> None:
    """As plans keep it, and check it when they are read."""
    rope = {
        "rope_type": "mrope",
        "mrope_section": [1, 1, 0],
        "rope_theta": 1e6,
        "partial_rotary_factor": partial,
    }
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, **NET}
    text |= {"rope_scaling": rope, "full_attention_interval": 3, "model_type": "qwen3_5_text"}
    made = normalise_config({"model_type": "qwen3_5", "text_config": text})
    assert made["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": partial or 0.25,
    }
    assert made["layer_types"] == [
        "linear_attention",
        "linear_attention",
        "full_attention",
        "linear_attention",
    ]
    assert normalise_config(made) == made


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer_types": ["linear_attention"] * 4}, UnsupportedModelError, "one with a full_attention layer"),
        ({"layer_types": ["sliding_attention"] * 4}, CheckpointError, "full_attention, linear_attention"),
        ({"layer_types": None, "full_attention_interval": 0}, CheckpointError, "full_attention_interval"),
        ({"linear_num_value_heads": 3}, CheckpointError, r"\(3\) is not a multiple of linear_num_key_heads"),
        ({"linear_conv_kernel_dim": 9}, CheckpointError, "from 2 to 8, not 9"),
        ({"linear_key_head_dim": 300}, CheckpointError, "from 1 to 256, not 300"),
        ({"hidden_act": "gelu_pytorch_tanh"}, UnsupportedModelError, "use a model with 'silu'"),
        ({"attn_output_gate": False}, UnsupportedModelError, "attn_output_gate false"),
        ({"partial_rotary_factor": 0.95}, CheckpointError, "rotates 15 of 16"),
        ({"partial_rotary_factor": 0.01}, CheckpointError, "even number"),
        ({"num_experts_per_tok": 7}, CheckpointError, "exceeds num_experts"),
    ],
)
def test_what_is_not_computed_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = {
        "model_type": "qwen3_next",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        **NET,
        **MOE,
        **changes,
    }
    with pytest.raises(error, match=message):
        build(open_checkpoint("dummy", config=config).config, context_len=32, activation="float32")
