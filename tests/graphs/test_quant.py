"""Quantization: what checkpoints' configs mean, what is refused, what programs and parameters become."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_programs import LIMITS, LLAMA, dummy, ops, traced

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.float8 import to_float8
from makeready.graphs.executable.cpu.weights import load_weights
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner.compile import compile_plan, trace_checkpoint
from makeready.graphs.planner.request import Request
from makeready.graphs.quant.scheme import Scheme
from makeready.graphs.quant.stored import stored_scheme

FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
WIDE = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}
LAYERS = LLAMA["num_hidden_layers"]
MIXTURE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def compressed(weights: dict[str, Any], activations: dict[str, Any], **more: Any) -> dict[str, Any]:
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, **weights},
        "input_activations": {**eight, **activations},
    }
    made = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    return {**made, "config_groups": {"group_0": {**group, **more.pop("group", {})}}, **more}


TOKEN, TENSOR = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
HEAD = ("lm_head",)
CHANNEL = {"strategy": "channel"}
INT8 = Scheme("channel", stored=True, dtype="int8", ignored=HEAD)


def integers(weights: dict[str, Any], activations: dict[str, Any], **more: Any) -> dict[str, Any]:
    kind = {"type": "int"}
    return compressed(weights | kind, activations | kind, **{"format": "int-quantized", **more})


def mixed(said: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """A file with a second group, of attention's linears."""
    (first,) = said["config_groups"].values()
    second = {**first, "targets": ["re:.*self_attn.*"], "weights": {**first["weights"], **weights}}
    groups = {
        "group_0": {**first, "format": "int-quantized"},
        "group_1": {**second, "format": "int-quantized"},
    }
    return {**said, "format": "mixed-precision", "config_groups": groups}


@pytest.mark.parametrize(
    ("said", "scheme"),
    [
        (None, None),
        (BLOCKS, Scheme("block", 128, stored=True, scale="weight_scale_inv", ignored=HEAD)),
        (
            {**BLOCKS, "modules_to_not_convert": ["model.layers.0"]},
            Scheme("block", 128, stored=True, scale="weight_scale_inv", ignored=(*HEAD, "model.layers.0")),
        ),
        ({"quant_method": "fp8"}, Scheme("tensor", stored=True, ignored=HEAD)),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["x"]},
            Scheme("tensor", static=True, stored=True, ignored=(*HEAD, "x")),
        ),
        (compressed({"strategy": "channel"}, TOKEN), Scheme("channel", stored=True, ignored=HEAD)),
        (
            compressed({"strategy": "tensor"}, TENSOR),
            Scheme("tensor", static=True, stored=True, ignored=HEAD),
        ),
        (compressed({"strategy": "channel"}, TOKEN, ignore=[]), Scheme("channel", stored=True, ignored=())),
        (
            compressed(
                {"strategy": "block", "block_structure": [128, 128]},
                {"strategy": "group", "group_size": 128, "dynamic": True},
            ),
            Scheme("block", 128, stored=True, ignored=HEAD),
        ),
        (integers(CHANNEL, TOKEN), INT8),
        (integers(CHANNEL, TOKEN, format="naive-quantized"), INT8),
        (integers(CHANNEL, TENSOR), replace(INT8, static=True)),
        (integers({"strategy": "tensor"}, TENSOR), replace(INT8, weights="tensor", static=True)),
        (integers(CHANNEL, TOKEN, ignore=["re:.*gate$"]), replace(INT8, ignored=("re:.*gate$",))),
        (
            integers(CHANNEL, TOKEN, group={"targets": ["re:.*_proj$", "model.layers.0.mlp.up_proj"]}),
            replace(INT8, targets=("re:.*_proj$", "model.layers.0.mlp.up_proj")),
        ),
        (
            mixed(integers(CHANNEL, TOKEN, group={"targets": ["re:.*mlp.*"]}), CHANNEL),
            replace(INT8, targets=("re:.*mlp.*", "re:.*self_attn.*")),
        ),
    ],
)
def test_configs_are_understood(said, scheme):
    assert stored_scheme({"quantization_config": said}) == scheme
    assert stored_scheme({"compression_config": said}) == scheme


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "hqq"}, "quantized with hqq are not supported; use the model's bf16"),
        ({"bits": 4}, "quantized with unnamed are not supported"),
        ({**BLOCKS, "fmt": "e5m2"}, "fmt 'e5m2' is not supported; use a checkpoint with e4m3"),
        ({**BLOCKS, "scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0' is not supported"),
        ({**BLOCKS, "activation_scheme": "static"}, "weight_block_size with activation_scheme 'static'"),
        (
            {**BLOCKS, "weight_block_size": [128, 64]},
            r"weight_block_size \[128, 64\] is not supported; blocks must",
        ),
        ({"quant_method": "fp8", "activation_scheme": "odd"}, "activation_scheme 'odd' is not supported"),
        ({"quant_method": "compressed-tensors"}, "needs config_groups that quantize alike"),
        (compressed({"strategy": "channel", "num_bits": 4}, TOKEN), "weights must be symmetric 8-bit floats"),
        (
            compressed({"strategy": "channel", "type": "int"}, TOKEN),
            "input_activations must .* both of one type",
        ),
        (
            compressed({"strategy": "channel"}, {**TOKEN, "symmetric": False}),
            "input_activations must be symm",
        ),
        (
            compressed({"strategy": "group"}, TOKEN),
            "strategy 'group' is not supported; use a checkpoint with ch",
        ),
        (
            compressed({"strategy": "channel"}, {**TENSOR, "dynamic": True}),
            "must be dynamic with strategy 'tok",
        ),
        (
            compressed({"strategy": "channel"}, TOKEN, format="marlin-24"),
            "format 'marlin-24' is not",
        ),
        (
            compressed({"strategy": "block", "block_structure": [64, 64]}, TOKEN),
            "weights in blocks of 64 need input_activations in groups of as many",
        ),
        (
            compressed({"strategy": "channel"}, TOKEN, group={"output_activations": {"num_bits": 8}}),
            "output_activations is not supported",
        ),
        (
            compressed({"strategy": "channel"}, TOKEN, sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config is not supported; use a checkpoint without it",
        ),
        (
            compressed({"strategy": "channel"}, TOKEN, group={"input_activations": None}),
            "input_activations must",
        ),
        (
            integers({**CHANNEL, "symmetric": False}, TOKEN),
            "weights must be symmetric 8-bit floats or integers",
        ),
        (integers(CHANNEL, {**TENSOR, "symmetric": False}), "input_activations must be symmetric 8-bit"),
        (integers({**CHANNEL, "num_bits": 4}, TOKEN), "weights must be symmetric 8-bit floats or integers"),
        (
            integers({"strategy": "group", "group_size": 128}, TOKEN),
            "strategy 'group' is not supported; use a checkpoint with channel or tensor",
        ),
        (
            integers({"strategy": "block", "block_structure": [128, 128]}, TOKEN),
            "strategy 'block' is not supported; use a checkpoint with channel or tensor",
        ),
        (integers(CHANNEL, TOKEN, format="float-quantized"), "format 'float-quantized' is not supported"),
        (integers(CHANNEL, TOKEN, group={"input_activations": None}), "input_activations must"),
        (integers(CHANNEL, TOKEN, group={"targets": []}), "config_groups name no targets"),
        (mixed(integers(CHANNEL, TOKEN), {"strategy": "tensor"}), "needs config_groups that quantize alike"),
        (integers(CHANNEL, TENSOR | {"dynamic": True}), "must be dynamic with strategy 'token' or static"),
    ],
)
def test_other_configs_are_refused(said, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        compile_plan(dummy(LLAMA | {"quantization_config": said}), **LIMITS)
    assert "\n" not in str(caught.value)


def test_ignored_modules_are_names_parts_or_patterns():
    scheme = Scheme("channel", ignored=("lm_head", "layers.1.mlp", "re:.*k_proj$"))
    assert not scheme.covers("lm_head")
    assert not scheme.covers("model.layers.1.mlp.up_proj")
    assert not scheme.covers("model.layers.0.self_attn.k_proj")
    assert scheme.covers("model.layers.1.mlp_up.up_proj")
    assert scheme.covers("model.layers.11.mlp.up_proj")
    assert scheme.covers("my_lm_head")


def test_targets_are_named_as_ignored_modules_are():
    scheme = Scheme("channel", targets=("re:.*mlp.*", "layers.0.self_attn"), ignored=("re:.*down_proj$",))
    assert scheme.covers("model.layers.7.mlp.up_proj")
    assert scheme.covers("model.layers.0.self_attn.q_proj")
    assert not scheme.covers("model.layers.1.self_attn.q_proj")
    assert not scheme.covers("model.layers.7.mlp.down_proj")


@pytest.mark.parametrize(
    ("config", "request_", "message"),
    [
        (
            LLAMA,
            {"quant": "int3"},
            "quant=int3 is not supported; choose one of fp8, fp8_block, int4, int8, mxfp4, stored",
        ),
        (
            MIXTURE,
            {"quant": "fp8_block"},
            "gate_proj has 48 outputs, which are no multiple of its blocks of 128; use",
        ),
        (
            LLAMA | {"quantization_config": BLOCKS},
            {"quant": "fp8"},
            "quant=fp8 was asked for, but dummy is quantized already; leave quant out",
        ),
    ],
)
def test_impossible_quantizations_are_refused(config, request_, message):
    with pytest.raises(PlanError, match=message):
        compile_plan(dummy(config), **LIMITS, **request_)


@pytest.mark.parametrize(
    ("config", "request_", "what"),
    [
        (LLAMA, {"quant": "fp8"}, "quant=fp8"),
        (LLAMA, {"kv_dtype": "fp8_e4m3"}, "kv.dtype=fp8_e4m3"),
        (LLAMA | {"quantization_config": BLOCKS}, {}, "this quantized checkpoint"),
    ],
)
def test_targets_without_8_bit_floats_refuse_them(config, request_, what, monkeypatch):
    monkeypatch.setattr("makeready.graphs.planner.compile._discover", lambda target: None)
    with pytest.raises(
        PlanError, match=f"{what} needs 8-bit floats, which sm_80 does not compute with; choose"
    ):
        compile_plan(dummy(config), target="sm_80", **LIMITS, **request_)


@pytest.mark.parametrize(
    ("config", "quant"),
    [(LLAMA, "int8"), (LLAMA | {"quantization_config": integers(CHANNEL, TOKEN)}, None)],
    ids=["made", "stored"],
)
def test_targets_without_8_bit_floats_have_integers(config, quant, monkeypatch):
    monkeypatch.setattr("makeready.graphs.planner.compile._discover", lambda target: None)
    lowered = trace_checkpoint(dummy(config), Request(target="sm_80", quant=quant, max_rows=2)).lower()
    assert "linear_int8" in ops(lowered.programs[DECODE])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3", "fp8_e4m3"])
def test_an_8_bit_cache_has_several_names(name):
    plan = compile_plan(dummy(), **LIMITS, kv_dtype=name)
    assert plan.options.kv_dtype == "float8_e4m3fn"
    assert {part.dtype for part in plan.kv.parts} == {"float8_e4m3fn"}


@pytest.mark.parametrize("phase", [EXTEND, DECODE])
@pytest.mark.parametrize("block", [False, True])
def test_a_layer_keeps_its_launches(phase, block):
    """Quantizing costs one launch a layer, behind attention; norms and activations take theirs in."""
    counts = Counter(ops(traced(WIDE, quant="fp8_block" if block else "fp8").lower().programs[phase]))
    linear = "linear_fp8_block" if block else "linear_fp8"
    once = ("locate", "find_pages", "embedding", "rope_rows", "sample", "token_logprobs", "linear")
    merged = dict.fromkeys(once, 1)
    merged |= {"rms_norm_quantize_fp8": 1, "add_rms_norm": 1, linear: 4 * LAYERS, "quantize_fp8": LAYERS}
    merged |= {"add_rms_norm_quantize_fp8": 2 * LAYERS - 1, "silu_mul_quantize_fp8": LAYERS}
    merged |= {"norm_rope_kv_write": LAYERS, f"{phase}_attention": LAYERS}
    if block:  # k's 32 rows end within a block: q, k and v stay apart, and so do what reads them
        merged[linear] += 2 * LAYERS
        merged |= {"norm_rope_kv_write": 0, "rope": 2 * LAYERS, "kv_write": LAYERS}
    made = {op: n for op, n in counts.items() if op not in ("columns", "gather_last")}
    assert made == {op: n for op, n in merged.items() if n}


def test_static_scales_of_what_is_read_together_are_one():
    """So that merging changes nothing, and tokens are quantized once."""
    config = WIDE | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    program = traced(config).lower().programs[DECODE]
    scales = [p for p in program.params.values() if p.largest]
    assert [len(p.pieces) for p in scales] == [3, 1, 2, 1] * LAYERS
    assert scales[0].name == "layers.0.attention.q+k+v.input_scale"
    assert [p.source for p in scales[0].pieces] == [
        f"model.layers.0.self_attn.{n}_proj.input_scale" for n in "qkv"
    ]
    assert ops(program).count("quantize_fp8_static") == 4 * LAYERS


def loaded(plan: Plan, checkpoint: Any) -> dict[str, torch.Tensor]:
    return load_weights(plan, checkpoint, lambda done, total: None)


def source(checkpoint: Any, name: str) -> torch.Tensor:
    """A weight of layer 0."""
    array = checkpoint.read(f"model.layers.0.{name}.weight")
    return (
        torch.from_numpy(array).view(torch.bfloat16).float()
        if array.dtype == np.uint16
        else torch.from_numpy(array)
    )


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["fp8", "fp8_block", "int8"])
def test_weights_are_quantized_as_by_hand(quant, weight_dtype):
    """Bytes of weights and scales, piece by piece of merged parameters, computed one block at a time."""
    checkpoint = dummy(WIDE | {"dtype": weight_dtype})
    plan = compile_plan(checkpoint, **(LIMITS | {"weight_dtype": weight_dtype}), quant=quant)
    plain = tuple(replace(w, param=replace(w.param, layout="rows")) for w in plan.weights)
    made = loaded(replace(plan, weights=plain), checkpoint)
    name = next(n for n in made if n.partition("@")[0] == "layers.0.mlp.gate+up.weight")
    q, scale = made[name], made["layers.0.mlp.gate+up.weight_scale"]
    rows = torch.cat([source(checkpoint, "mlp.gate_proj"), source(checkpoint, "mlp.up_proj")]).numpy()
    kind = torch.int8 if quant == "int8" else FP8
    assert (q.dtype, q.shape, scale.dtype) == (kind, rows.shape, torch.float32)
    tall, wide = (128, 128) if quant == "fp8_block" else (1, rows.shape[1])
    scale = scale.view(len(rows) // tall, rows.shape[1] // wide)
    for i, j in np.ndindex(*scale.shape):
        here = slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)
        wanted = np.float32(np.abs(rows[here]).max()) / np.float32(127 if quant == "int8" else 448)
        assert scale[i, j] == wanted
        if quant == "int8":
            assert np.array_equal(q.numpy()[here], np.rint(rows[here] / wanted))
        else:
            assert np.array_equal(q.view(torch.uint8).numpy()[here], to_float8(rows[here] / wanted))


@pytest.mark.parametrize("config", [{"quant_method": "fp8", "activation_scheme": "static"}, BLOCKS], ids=str)
def test_dummies_of_quantized_configs_are_sensible(config):
    """8-bit weights that use their range, scales that bring them back to ordinary weights."""
    checkpoint = dummy(WIDE | {"quantization_config": config})
    plan = compile_plan(checkpoint, **LIMITS)
    made = loaded(plan, checkpoint)
    q = torch.from_numpy(checkpoint.read("model.layers.0.mlp.up_proj.weight")).view(FP8).float()
    assert 80 < q.std() < 120
    assert len(q.unique()) > 150
    for name, scale in made.items():
        if name.endswith("weight_scale"):
            assert scale.min() > 0
            assert 0.01 < (scale * 100).mean() < 0.04
        elif name.endswith("input_scale"):
            assert 0.005 < scale.item() < 0.05


def stored(folder, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(WIDE | {"quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def everything(quantization: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, random, in the shapes and dtypes of a dummy's."""
    checkpoint = dummy(WIDE | {"quantization_config": quantization})
    compile_plan(checkpoint, **LIMITS)
    tensors = {}
    for name, info in checkpoint.tensors.items():
        array = torch.from_numpy(checkpoint.read(name))
        tensors[name] = array.view(FP8) if info.dtype == "float8_e4m3fn" else array
    return tensors


def test_a_tensors_scale_is_repeated_for_each_of_its_rows(tmp_path):
    """Merged weights keep a scale for each piece, whatever shape it was stored in."""
    quantization = {"quant_method": "fp8"}
    tensors = everything(quantization)
    prefix = "model.layers.0.self_attn"
    for shape, (name, value) in zip([(), (1,), (1, 1)], {"q": 1.5, "k": 0.25, "v": 3.0}.items(), strict=True):
        tensors[f"{prefix}.{name}_proj.weight_scale"] = torch.full(shape, value)
    checkpoint = stored(tmp_path, tensors, quantization)
    made = loaded(compile_plan(checkpoint, **LIMITS), checkpoint)
    scale = made["layers.0.attention.q+k+v.weight_scale"]
    assert scale.tolist() == [1.5] * 128 + [0.25] * 32 + [3.0] * 32


def test_stored_blocks_that_divide_nothing_are_filled_up_with_zeros(tmp_path):
    """Rows of weights end within a block: behind them stand zeros, and scales are as they were stored."""
    quantization = {**BLOCKS, "weight_block_size": [100, 100]}
    tensors = everything(quantization)
    checkpoint = stored(tmp_path, tensors, quantization)
    plan = compile_plan(checkpoint, **LIMITS)
    made = loaded(plan, checkpoint)
    for module, width in (
        ("model.layers.0.self_attn.o_proj", 128),
        ("model.layers.1.mlp.down_proj", 256),
    ):
        theirs = tensors[f"{module}.weight"]
        named = {p.source: made[w.param.name] for w in plan.weights for p in w.param.pieces}
        ours = named[f"{module}.weight"]
        assert theirs.shape == (128, width)
        assert ours.shape == (128, -(-width // 100) * 100)
        assert torch.equal(ours[:, :width].view(torch.uint8), theirs.view(torch.uint8))
        assert (ours[:, width:].view(torch.uint8) == 0).all()
        scale = tensors[f"{module}.weight_scale_inv"]
        assert scale.shape == (2, -(-width // 100))
        assert torch.equal(named[f"{module}.weight_scale_inv"], scale)


def test_checkpoints_that_contradict_their_config_are_refused(tmp_path):
    quantization = {"quant_method": "fp8"}
    tensors = everything(quantization)
    name = "model.layers.1.mlp.up_proj"
    lacking = {k: v for k, v in tensors.items() if k != f"{name}.weight_scale"}
    with pytest.raises(PlanError, match=f"lacks the tensor {name}.weight_scale; is it complete"):
        compile_plan(stored(tmp_path / "a", lacking, quantization), **LIMITS)
    wide = tensors | {f"{name}.weight": tensors[f"{name}.weight"].float()}
    with pytest.raises(
        PlanError, match=rf"{name}.weight of .* is float32, its quantization_config implies float8"
    ):
        compile_plan(stored(tmp_path / "b", wide, quantization), **LIMITS)
    ignoring = {**quantization, "ignored_layers": ["up_proj"]}
    with pytest.raises(PlanError, match=r"is float8_e4m3fn, its quantization_config implies no float8"):
        compile_plan(stored(tmp_path / "c", tensors, ignoring), **LIMITS)
    vector = tensors | {f"{name}.weight_scale": torch.ones(256)}
    with pytest.raises(PlanError, match=rf"{name}.weight_scale of .* is \[256\], the config implies \[1\]"):
        compile_plan(stored(tmp_path / "d", vector, quantization), **LIMITS)


def test_plans_of_other_quantizations_have_other_digests():
    digests = {
        compile_plan(dummy(WIDE), **LIMITS, quant=quant).digest
        for quant in (None, "fp8", "fp8_block", "int8")
    }
    assert len(digests) == 4


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=50))
def test_8_bit_bytes_are_pytorchs(values):
    x = torch.tensor(values, dtype=torch.float32)
    wanted = x.clamp(-448, 448).to(FP8).view(torch.uint8)
    made = torch.from_numpy(to_float8(x.numpy()))
    nan = x.isnan()
    assert torch.equal(made[~nan], wanted[~nan])
    assert (made[nan] & 0x7F == 0x7F).all()


def test_every_8_bit_number_and_the_middles_between_them():
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(FP8).float()
    number = ~values.isnan()
    assert torch.equal(torch.from_numpy(to_float8(values.numpy()))[number], every[number])
    line = values[number].unique()
    middle = (line[1:] + line[:-1]) / 2
    for x in (middle, torch.nextafter(middle, line[1:]), torch.nextafter(middle, line[:-1])):
        assert torch.equal(torch.from_numpy(to_float8(x.numpy())), x.to(FP8).view(torch.uint8))


def test_a_plan_says_what_is_quantized():
    plan = compile_plan(dummy(WIDE), **LIMITS, quant="fp8")
    assert "linears f8_e4m3fn, other weights f32" in plan.as_text()
    memory = plan.memory_analysis()
    assert memory["stored_twice"] == 0  # a scale comes of the same rows as its weight
    assert memory["parameters"] == compile_plan(dummy(WIDE), **LIMITS).memory_analysis()["parameters"]
