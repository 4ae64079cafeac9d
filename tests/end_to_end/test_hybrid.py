"""Gated delta nets beside attention against transformers in fp32: tiny random Qwen3-Next and Qwen3.5."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_quantized
import torch
import transformers
from quantized_models import Format, quantize_model, save_quantized
from reference import Generation, Recorder, compare, expected, make_model, prompt_of
from safetensors.torch import load_file, save_file
from small_configs import QWEN3
from transformers import cache_utils

from makeready.engine.llm import LLM, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.engine.sequence import TokenSequence
from makeready.graphs.checkpoint.base import CheckpointError, CheckpointWarning, open_checkpoint
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.cpu.weights import assemble
from makeready.graphs.models.family import UnsupportedModelError, build
from makeready.graphs.passes import REWRITES
from makeready.graphs.plan.artifact import load as load_plan
from makeready.graphs.plan.artifact import save as save_plan
from makeready.graphs.plan.check import check_plan
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import Split
from makeready.graphs.planner.compile import compile_plan

PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 80, "page_size": 8, "weight_dtype": "float32"}
LENGTHS = (1, 2, 3, 4, 8, 9, 24, 65, 90)
NET: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 12,
}
MOE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "next": ("qwen3_next", MOE),
    "next-dense": ("qwen3_next", {"mlp_only_layers": [0, 1, 2, 3], "attention_bias": True}),
    "next-every-other": (
        "qwen3_next",
        {
            **MOE,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "layer_types": ["full_attention", "linear_attention"] * 2,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "3.5": (
        "qwen3_5",
        {"linear_num_value_heads": 2, "linear_value_head_dim": 40, "tie_word_embeddings": True},
    ),
    "3.5-moe": ("qwen3_5_moe", MOE),
}


def model_of(folder: Path, name: str, **changes: Any) -> Any:
    """The model; decays are small enough that states reach far, and some forget at once."""
    family, config = MODELS[name]
    model = make_model(folder, family, **(NET | config | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, -6, 1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, name)
    recorder = Recorder(LLM(tmp_path, **PLAN))
    for length in LENGTHS:
        prompt = prompt_of(length, 131)
        (ours,) = recorder.generate([prompt], 6)
        compare(ours, expected(model, prompt, 6))


@pytest.mark.parametrize("disabled", [*((name,) for name in REWRITES), tuple(REWRITES)], ids="-".join)
def test_every_pass_on_or_off(disabled: tuple[str, ...], tmp_path: Path) -> None:
    model = model_of(
        tmp_path, "next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    )
    recorder = Recorder(LLM(tmp_path, **PLAN, disabled_passes=disabled))
    prompt = prompt_of(30, 131)
    compare(recorder.generate([prompt], 4)[0], expected(model, prompt, 4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hybrid")
    return folder, model_of(folder, "next")


class Poisoned(Recorder):
    """Fills whatever no sequence holds with NaN before every step; few pages send sequences back."""

    def __init__(self, folder: Path, *, pages: int | None = None, **options: Any) -> None:
        super().__init__(LLM(folder, **PLAN))
        executable: Any = self.llm.engine.executable
        executable.asynchronous = True
        if pages is not None:
            executable.pages = pages
        self.llm.engine = Engine(executable, SchedulerOptions(**options))
        recorded = executable.launch

        def launch(*arguments: Any, **cut: Any) -> Any:
            executable.poison()
            for group in executable.plan.kv.groups:
                free = self.llm.engine.pools.by_name[group.name]._free
                for part in group.parts:
                    executable._tensors[part.name][free] = float("nan")
            return recorded(*arguments, **cut)

        executable.launch = launch

    def follow(self) -> list[TokenSequence]:
        """The sequences that are submitted from now on."""
        submitted, submit = [], self.llm.engine.submit

        def follow(sequence: TokenSequence) -> None:
            submitted.append(sequence)
            submit(sequence)

        self.llm.engine.submit = follow  # type: ignore[method-assign]
        return submitted


def check(made: Sequence[Generation], wanted: Sequence[Generation]) -> None:
    for ours, theirs in zip(made, wanted, strict=True):
        compare(ours, theirs)


@pytest.mark.parametrize("size", [1, 3, 63, 64, 65])
def test_prompts_may_be_cut_anywhere(size: int, tiny: tuple[Path, Any]) -> None:
    folder, model = tiny
    prompts = [prompt_of(length, 131, seed=size) for length in ((70, 9) if size == 1 else (150, 64, 2, 67))]
    made = Poisoned(folder, chunked_prefill_size=size).generate(prompts, 4)
    check(made, [expected(model, prompt, 4) for prompt in prompts])


def test_prefixes_are_shared_wherever_a_prompt_ends(tiny: tuple[Path, Any]) -> None:
    """Each prompt parts from the one before it at another place, at page borders and within pages."""
    folder, model = tiny
    recorder, stem = Poisoned(folder), prompt_of(60, 131)
    submitted = recorder.follow()
    for end in (60, 59, 41, 40, 39, 33, 32, 31, 17, 16, 15, 9, 8, 7, 1, 60):
        prompt = [*stem[:end], 5, end]
        made = recorder.generate([prompt], 3)
        check(made, [expected(model, prompt, 3)])
    assert sum(sequence.cached_tokens > 0 for sequence in submitted) > 4


def test_rows_that_are_sent_back_begin_again(tiny: tuple[Path, Any]) -> None:
    """Prompts that share beginnings, in few pages: retraction and eviction, chunks beside decoding rows."""
    folder, model = tiny
    stems = [prompt_of(50, 131, seed=seed) for seed in range(2)]
    prompts = [[*stems[i % 2][: 6 * i], i, 3] for i in range(8)]
    recorder = Poisoned(
        folder, pages=20, chunked_prefill_size=13, new_token_ratio=0.0, min_new_token_ratio=0.0
    )
    sequences = recorder.follow()
    wanted = [expected(model, prompt, 30).tokens for prompt in prompts]
    # With a stop token, which does not come, nobody knows how long outputs will be.
    never = min(set(range(131)).difference(*wanted))
    made = recorder.generate(prompts, 30, stop_token_ids=[never])
    assert sum(sequence.retractions for sequence in sequences) > 0
    assert sum(sequence.cached_tokens for sequence in sequences) > 30
    assert [ours.tokens for ours in made] == wanted  # logits of what ran twice are there twice


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


def test_a_plan_says_what_states_take(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    """By hand: three layers of 4 heads' states and 3 inputs of a convolution, 2 blocks a row and the first.

    Where memory holds more than the rows' contexts, each further context brings a snapshot.
    """
    plan = LLM(tiny[0], **PLAN).plan
    assert load_plan(save_plan(plan, tmp_path / "plan")) == plan
    (state,) = plan.kv.states
    convolved = 2 * 2 * 20 + 4 * 12
    assert state.block_bytes == 3 * 4 * (4 * 20 * 12 + 3 * convolved)
    blocks = 2 * PLAN["max_rows"] + 1
    bounded = plan.memory_analysis()["kv"]["bounded"]
    assert bounded == {
        "state": {"blocks": blocks, "block_bytes": state.block_bytes, "bytes": blocks * state.block_bytes}
    }
    assert f"of state ({blocks} blocks of" in plan.as_text()
    assert "4 rows in flight, 0 snapshots)" in plan.as_text()
    whole = 32 * plan.kv.page_bytes  # of a context of 256
    few = plan.memory.fixed + plan.kv.page_bytes + 4 * whole + blocks * state.block_bytes
    assert plan.pages_in(few) == 1 + 4 * 32
    assert plan.pages_in(few - 1) == 4 * 32, "the last row's states come with its last page"
    more = few + 3 * (whole + state.block_bytes)
    assert plan.kv.split(plan.pages_in(more), plan.limits) == Split(4, 3)
    least = plan.memory.fixed + 2 * plan.kv.page_bytes + 3 * state.block_bytes
    assert plan.pages_in(least) == 2
    with pytest.raises(
        PlanError, match=r"states of one row .*; free some or compile with kv\.state_dtype=bfloat16"
    ):
        plan.pages_in(least - 1)
    kept = LLM(tiny[0], **PLAN, kv_state_snapshots=7).plan
    assert kept.kv.split(1 + 4 * 32, plan.limits) == Split(4, 7)
    with pytest.raises(
        PlanError, match=r"and of 7 snapshots .*; free some or lower kv\.state_snapshots=7 or"
    ):
        kept.pages_in(least)


@pytest.mark.parametrize("name", MODELS)
def test_states_of_16_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers with states that are rounded behind the prompt and behind every token, as steps leave them."""
    model = model_of(tmp_path, name)
    # One bucket and no cache: a prompt is one step, however long.
    plan, alone = {**PLAN, "max_extend_buckets": 1}, SchedulerOptions(prefix_cache=False)
    recorder = Recorder(LLM(tmp_path, **plan, kv_state_dtype="bfloat16", scheduler=alone))
    parts = recorder.llm.plan.kv.states[0].parts
    kept = {part.name.rpartition(".")[2]: part.dtype for part in parts}
    assert kept == {"conv": "float32", "state": "bfloat16"}
    keep = cache_utils.LinearAttentionLayer.update_recurrent_state

    def rounded(self: Any, recurrent_states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return keep(self, recurrent_states.bfloat16().float(), *arguments, **options)

    monkeypatch.setattr(cache_utils.LinearAttentionLayer, "update_recurrent_state", rounded)
    errors = []
    for length in LENGTHS[:-1]:  # the longest takes two steps
        prompt = prompt_of(length, 131)
        (ours,), theirs = recorder.generate([prompt], 6), expected(model, prompt, 6)
        compare(ours, theirs, 1e-2)
        errors += [abs(x - y).max() / abs(y).max() for x, y in zip(ours.logits, theirs.logits, strict=True)]
    # A number on the edge may be rounded to its other neighbour; where nothing is rounded, half are off by 2e-3.
    assert np.median(errors) < 5e-4


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"kv_state_dtype": "bfloat16"}, r"kv\.state_dtype=bfloat16 is for models with recurrent states"),
        ({"kv_state_snapshots": 3}, r"kv\.state_snapshots=3 is for models with recurrent states"),
        (
            {"kv_state_dtype": "float16"},
            r"kv\.state_dtype=float16 is not supported; choose one of float32, bfloat16",
        ),
        ({"kv_state_snapshots": -1}, r"kv\.state_snapshots=-1 must be a whole number of at least 0"),
    ],
)
def test_what_is_asked_of_states_that_are_not_there_is_refused(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        compile_plan(DummyCheckpoint(dict(QWEN3)), target="cpu", **asked)


@pytest.mark.parametrize("field", ["row_slot", "query_len", "grow_at"])
def test_a_plan_that_finds_states_elsewhere_is_refused(field: str, tiny: tuple[Path, Any]) -> None:
    """Blocks of states are named by the fields of their own group alone, which have their numbers."""
    plan = LLM(tiny[0], **PLAN).plan
    decode = plan.programs["decode"]
    at = next(i for i, launch in enumerate(decode.launches) if launch.op == "recurrent_delta_rule")
    launches = [*decode.launches]
    assert launches[at].operands["state_in"] == "state_in.state"
    launches[at] = replace(launches[at], operands={**launches[at].operands, "state_in": field})
    changed = replace(plan, programs={**plan.programs, "decode": replace(decode, launches=tuple(launches))})
    assert check_plan(plan) is plan
    with pytest.raises(PlanError, match=f"recurrent_delta_rule reads '{field}' as state_in"):
        check_plan(changed)
