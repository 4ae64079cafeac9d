"""Tensors that nothing reads, and dtypes that are no weights: named, and refused where the result would be wrong."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import LLAMA, state_dict, write_folder, write_gguf
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.checkpoint.base import CheckpointError, CheckpointWarning, open_checkpoint
from makeready.graphs.executable.match import check_checkpoint
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.planner.compile import compile_plan

LIMITS: dict[str, Any] = {"max_rows": 2, "max_tokens": 8, "page_size": 8}
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return state_dict(LLAMA)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of the config alone, as a preset's: the checkpoints below are seen when it is loaded."""
    return compile_plan(open_checkpoint("dummy", config=LLAMA), **LIMITS)


# Both when a plan is compiled and when one is loaded.
SURE: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"model.layers.2.mlp.up_proj.weight": torch.ones(64, 96)}, "num_hidden_layers=2; correct the config"),
    ({"model.layers.11.input_layernorm.weight": torch.ones(96)}, "num_hidden_layers=2; correct the config"),
    ({f"{Q}.bias": torch.tensor([0.0] * 191 + [1e-3])}, "which its config leaves out; set attention_bias"),
    ({f"{Q}.bias": torch.full((192,), -1.0).bfloat16()}, "which its config leaves out; set attention_bias"),
    ({"lm_head.bias": torch.ones(97)}, "which its config leaves out"),
    ({"model.norm.bias": torch.ones(96)}, "which its config leaves out"),
    ({"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}, "which LlamaForCausalLM does not have"),
    ({f"{Q}.weight_scale": torch.tensor(0.5)}, "names no quantization that has weight_scale; add the"),
    ({f"{Q}.weight_scale_inv": torch.full((2, 1), 2.0)}, "names no quantization that has weight_scale_inv"),
    ({f"{Q}.weight_zero_point": torch.ones(192, 1, dtype=torch.int8)}, "asymmetric quantization is not"),
]


@pytest.mark.parametrize(("more", "message"), SURE, ids=[next(iter(more)) for more, _ in SURE])
def test_what_surely_changes_the_result_is_an_error(more, message, state, plan, tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, LLAMA, {**state, **more}))
    for use in (lambda: compile_plan(checkpoint, **LIMITS), lambda: check_checkpoint(plan, checkpoint)):
        with pytest.raises(
            CheckpointError, match=f"has the tensor {next(iter(more))}, .*{message}"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_other_tensors_get_one_warning_that_counts_and_names_them(state, plan, tmp_path):
    more = {f"visual.blocks.{i}.weight": torch.ones(2) for i in range(5)}
    more |= {f"{Q}.k_scale": torch.tensor(0.5), "score.weight": torch.ones(2, 96)}
    checkpoint = open_checkpoint(write_folder(tmp_path, LLAMA, {**state, **more}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        compile_plan(checkpoint, **LIMITS)
        check_checkpoint(plan, checkpoint)
    (told,) = [str(w.message) for w in caught if w.category is CheckpointWarning]
    assert f"{tmp_path} has 7 tensors that the model does not read: {Q}.k_scale, score.weight, visual" in told
    assert "visual.blocks.2.weight and 2 more; if they belong" in told


@pytest.mark.parametrize(
    "more",
    [
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16, dtype=torch.float64)},
        {f"{Q}.weight_scale": torch.ones(192, 1).bfloat16()},
        {f"{Q}.bias": torch.tensor([0.0, -0.0] * 96).bfloat16()},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_surely_changes_nothing_is_no_error(more, state, tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, LLAMA, {**state, **more}))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if "inv_freq" in next(iter(more)) else "ignore")
        compile_plan(checkpoint, **LIMITS)


def test_layers_that_predict_further_tokens_are_left_out(state, tmp_path):
    config = {**LLAMA, "num_nextn_predict_layers": 1}
    more = {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 96)}
    checkpoint = open_checkpoint(write_folder(tmp_path / "a", config, {**state, **more}))
    with pytest.warns(
        CheckpointWarning, match=r"has 1 tensor .* model\.layers\.2\.mlp.*; they predict further"
    ):
        compile_plan(checkpoint, **LIMITS)
    more = {"model.layers.3.mlp.up_proj.weight": torch.ones(64, 96)}
    with pytest.raises(CheckpointError, match="num_hidden_layers=2"):
        compile_plan(open_checkpoint(write_folder(tmp_path / "b", config, {**state, **more})), **LIMITS)


def test_gguf_files_are_held_to_the_same(state, tmp_path):
    more = {"model.layers.1.self_attn.o_proj.bias": torch.ones(96)}
    path = write_gguf(tmp_path / "x.gguf", "llama", LLAMA, {**state, **more})
    with pytest.raises(CheckpointError, match=r"has the tensor model.layers.1.self_attn.o_proj.bias, which"):
        compile_plan(path, **LIMITS)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float8_e5m2),
        *(torch.float8_e8m0fnu, torch.float8_e4m3fn),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [f"{Q}.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_dtypes_that_are_no_weights_are_refused_by_name(dtype, name, state, plan, tmp_path):
    odd = {name: state[name].abs().clamp(1, 2).to(dtype)}
    checkpoint = open_checkpoint(write_folder(tmp_path, LLAMA, {**state, **odd}))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(PlanError, match=rf"tensor {name} of {tmp_path} is {kind}, (which is no|its quantiz)"):
        compile_plan(checkpoint, **LIMITS)
    with pytest.raises(PlanError, match=rf"it needs tensor {name}, {tmp_path} has it as {kind}\["):
        check_checkpoint(plan, checkpoint)


def test_scales_of_other_formats_are_refused_by_name(tmp_path):
    """Powers of two in 8 bits, as some block formats store them, are bits to numpy."""
    config = {**LLAMA, "quantization_config": {"quant_method": "fp8"}}
    checkpoint = open_checkpoint("dummy", config=config)
    compile_plan(checkpoint, **LIMITS)
    tensors = {}
    for name, info in checkpoint.tensors.items():
        array = torch.from_numpy(checkpoint.read(name))
        tensors[name] = array.view(torch.float8_e4m3fn) if info.dtype == "float8_e4m3fn" else array
    tensors[f"{Q}.weight_scale"] = torch.ones(1).to(torch.float8_e8m0fnu)
    with pytest.raises(
        PlanError, match=rf"{Q}.weight_scale of .* is float8_e8m0fnu, which is no quantization"
    ):
        compile_plan(write_folder(tmp_path, config, tensors), **LIMITS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_plain_dtypes_are_converted(dtype, tmp_path):
    """As transformers does; the plan is a preset's."""
    torch.manual_seed(0)
    config = {k: v for k, v in LLAMA.items() if k not in ("torch_dtype", "model_type", "architectures")}
    model = (
        LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.2, eos_token_id=None))
        .half()
        .float()
        .eval()
    )
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    preset = compile_plan(open_checkpoint("dummy", config=LLAMA), **LIMITS)
    made = compile_plan(tmp_path, **LIMITS, weight_dtype="float32")
    assert replace(made, tokenizer=preset.tokenizer).digest == preset.digest
    greedy = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    (output,) = LLM(tmp_path, preset).generate(token_ids=[[1, 2, 3, 4, 5]], sampling=greedy)
    wanted = model.generate(torch.tensor([[1, 2, 3, 4, 5]]), max_new_tokens=6, do_sample=False)
    assert list(output.token_ids) == wanted[0, 5:].tolist()


def test_a_folder_of_pathological_names_is_not_mistaken_for_layers(state, tmp_path: Path):
    more = {"model.layers.x.weight": torch.ones(2), "language_model.layers.9.weight": torch.ones(2)}
    with pytest.warns(CheckpointWarning, match="has 2 tensors"):
        compile_plan(write_folder(tmp_path, LLAMA, {**state, **more}), **LIMITS)
