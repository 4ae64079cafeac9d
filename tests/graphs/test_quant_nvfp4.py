"""NVFP4 in files of compressed-tensors and modelopt and while loading: configs, plans, refusals, dummy weights."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_programs import LIMITS, LLAMA, dummy, ops, traced

from makeready.graphs.checkpoint.base import CheckpointWarning, open_checkpoint
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.quant.modelopt import Mixed
from makeready.graphs.quant.scheme import Scheme
from makeready.graphs.quant.stored import stored_scheme
from makeready.graphs.quant.weight_only import Form, WeightOnly

DENSE = LLAMA | {
    "hidden_size": 128,
    "intermediate_size": 208,  # 13 blocks: the last pair has one
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTURE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
UP, Q, EXPERT = (
    "model.layers.3.mlp.up_proj",
    "model.layers.3.self_attn.q_proj",
    "model.layers.3.mlp.experts.7",
)
NARROW = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "dynamic": "local"}


def compressed(weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    usual = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    usual["scale_dtype"] = "torch.float8_e4m3fn"
    group = {"targets": ["Linear"], "weights": {**usual, **(weights or {})}, **more.pop("group", {})}
    made = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]}
    return {**made, "config_groups": {"group_0": group}, **more}


def modelopt(algorithm: str | None = "W4A16_NVFP4", **more: Any) -> dict[str, Any]:
    """As config.json has it."""
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


def in_a_file(algorithm: str = "W4A16_NVFP4", **more: Any) -> dict[str, Any]:
    """As hf_quant_config.json has it."""
    said = {"quant_algo": algorithm, "group_size": 16, "exclude_modules": ["lm_head"], **more}
    return {"producer": {"name": "modelopt"}, "quantization": said}


def mixed(layers: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As config.json has it where formats differ."""
    return modelopt("MIXED_PRECISION", quantized_layers=layers, **more)


@pytest.mark.filterwarnings("ignore:.*activations of 4 bits are not computed here")
def test_formats_by_module() -> None:
    """Those that are not named stay wide, what is in a named one is as that is, and lists of others are followed."""
    layers = {Q: {"quant_algo": "FP8"}, UP: {"quant_algo": "nvfp4", "group_size": 16}}
    layers |= {
        "model.layers.3.mlp.experts": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "lm_head": layers[UP],
    }
    found = stored_scheme({"quantization_config": mixed(layers)})
    assert isinstance(found, Mixed)
    eight, tokens, four = found.parts
    assert isinstance(eight, Scheme)
    assert isinstance(tokens, Scheme)
    assert isinstance(four, WeightOnly)
    assert ((eight.weights, eight.static), (tokens.weights, tokens.static)) == (
        ("tensor", True),
        ("channel", False),
    )
    modules = (Q, UP, f"{EXPERT}.up_proj", Q.replace("q_proj", "k_proj"), Q.replace("3", "33"), "lm_head")
    assert [module for module in modules if eight.covers(module)] == [Q]
    assert [module for module in modules if tokens.covers(module)] == [f"{EXPERT}.up_proj"]
    assert [module for module in modules if four.of(module)] == [UP]
    assert found.features == {"fp8"}


@pytest.mark.filterwarnings("ignore:.*activations of 4 bits are not computed here")
def test_experts_of_several_formats_are_refused() -> None:
    layers = {
        f"model.layers.{layer}.mlp.experts.{e}.{part}_proj": {"quant_algo": "FP8" if e == 1 else "NVFP4"}
        for layer in range(2)
        for e in range(4)
        for part in ("gate", "up", "down")
    }
    with pytest.raises(
        PlanError, match=r"experts\.0\.\w+_proj and what is used with it are quantized differently"
    ):
        traced(MIXTURE | {"quantization_config": mixed(layers)})


@pytest.mark.parametrize(
    ("said", "module", "form"),
    [
        (compressed(), Q, Form(4, 16)),
        (compressed(), "lm_head", None),
        (compressed(ignore=["re:.*q_proj$"]), Q, None),
        (compressed(group={"targets": ["re:.*mlp.*"]}), Q, None),
        (compressed({"scale_dtype": None}), UP, Form(4, 16)),
        (modelopt(), UP, Form(4, 16)),
        (modelopt(), "lm_head", None),
        (modelopt(ignore=[]), "lm_head", Form(4, 16)),
        (modelopt(ignore=["model.layers.3.self_attn*"]), Q, None),
        (modelopt(ignore=["model.layers.3.self_attn*"]), Q.replace("3", "33"), Form(4, 16)),
        (modelopt(ignore=["*.mlp.gate"]), UP, Form(4, 16)),
        (modelopt(ignore=["model.layers.3.mlp"]), f"{EXPERT}.up_proj", None),
        (modelopt("w4a16_nvfp4"), UP, Form(4, 16)),
        (modelopt("W4A16_AWQ", group_size=128), UP, Form(4, 128)),
        (modelopt("W4A16_AWQ", config_groups={"0": {"weights": {"group_size": 64}}}), UP, Form(4, 64)),
        ({"quant_method": "modelopt", **in_a_file(exclude_modules=["*self_attn*"])}, Q, None),
        ({"quant_method": "modelopt", **in_a_file(exclude_modules=["*self_attn*"])}, UP, Form(4, 16)),
    ],
)
def test_configs_are_read(said: dict[str, Any], module: str, form: Form | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheme = stored_scheme({"quantization_config": said})
    assert isinstance(scheme, WeightOnly)
    assert scheme.of(module) == form


@pytest.mark.parametrize(
    ("said", "scheme"),
    [
        (modelopt("FP8"), Scheme("tensor", static=True, stored=True)),
        (modelopt("FP8_PER_CHANNEL_PER_TOKEN"), Scheme("channel", stored=True)),
        (modelopt("W8A8_SQ_PER_CHANNEL"), Scheme("channel", static=True, stored=True, dtype="int8")),
    ],
)
def test_modelopt_has_8_bits_too(said: dict[str, Any], scheme: Scheme) -> None:
    assert stored_scheme({"quantization_config": said}) == scheme


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            compressed(group={"input_activations": NARROW}),
            "activations of 4 bits are not computed here.*W4A16",
        ),
        (modelopt("NVFP4"), "activations of 4 bits are not computed here.*W4A16"),
        (
            modelopt(kv_cache_scheme={"num_bits": 8, "type": "float"}),
            "the cache has the dtype that kv.dtype says",
        ),
        (
            {"quant_method": "modelopt", **in_a_file(kv_cache_quant_algo="FP8")},
            "the cache has the dtype that kv.dtype says",
        ),
    ],
)
def test_what_is_not_done_is_told(said: dict[str, Any], message: str) -> None:
    with pytest.warns(CheckpointWarning, match=message):
        stored_scheme({"quantization_config": said})


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (compressed({"group_size": 32}), "must be symmetric, of 4 bits in groups of 16"),
        (compressed({"num_bits": 8}), "must be symmetric, of 4 bits in groups of 16"),
        (compressed({"symmetric": False}), "must be symmetric, of 4 bits in groups of 16"),
        (compressed({"type": "int"}), "type 'int' is not supported; use a checkpoint with float"),
        (compressed({"strategy": "group"}), "strategy 'group' is not supported"),
        (compressed({"scale_dtype": "torch.uint8"}), "scale_dtype 'torch.uint8' is not supported"),
        (compressed({"actorder": "group"}), "actorder of nvfp4-pack-quantized is not supported"),
        (
            compressed(group={"input_activations": {**NARROW, "num_bits": 8}}),
            "input_activations beside nvfp4-pack-quantized weights are not supported",
        ),
        (compressed(group={"output_activations": NARROW}), "output_activations beside nvfp4"),
        (modelopt(None), "quant_algo None of modelopt is not supported; use a checkpoint with NVFP4 or"),
        (modelopt("NVFP4_SVD"), "quant_algo 'NVFP4_SVD' of modelopt is not supported"),
        (modelopt("MIXED_PRECISION"), "quantized_layers of modelopt's MIXED_PRECISION must be an object"),
        (mixed({UP: "FP8"}), "must be an object of objects by module"),
        (
            mixed({UP: {"quant_algo": "W4A8_AWQ", "group_size": 128, "pre_quant_scale": True}}),
            "quant_algo 'W4A8_AWQ' of model.layers.3.mlp.up_proj of modelopt is not supported",
        ),
        (mixed({UP: {"quant_algo": "W8A16"}}), "'W8A16' of model.layers.3.mlp.up_proj"),
        (modelopt("W4A16_AWQ"), "group_size must be a whole number, not None; correct config.json"),
        (modelopt("W4A16_AWQ", group_size=48), "groups of 48 inputs are not supported"),
        (modelopt("W4A16_AWQ", group_size=64, has_zero_point=True), "W4A16_AWQ with zero points is not"),
        (
            mixed({Q: {"quant_algo": "MIXED_PRECISION"}}),
            "'MIXED_PRECISION' of model.layers.3.self_attn.q_proj",
        ),
        (
            mixed({Q: {"quant_algo": "NVFP4", "group_size": 32}}),
            "groups of 32 of model.layers.3.self_attn.q_proj",
        ),
        (modelopt(group_size=32), "NVFP4 in groups of 32 is not supported"),
        (modelopt(group_size="16"), "group_size must be a whole number"),
        ({"quant_method": "modelopt", "quantization": "NVFP4"}, "quantization must be an object"),
        ({"quant_method": "modelopt", **in_a_file(exclude_modules="lm_head")}, "must be a list of names"),
    ],
)
def test_other_configs_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        compile_plan(dummy(DENSE | {"quantization_config": said}), **LIMITS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DENSE | {"intermediate_size": 200},
            "200 inputs are no multiple of NVFP4's blocks of 16; use a checkpoint with 16-bit",
        ),
        (
            MIXTURE | {"moe_intermediate_size": 48},
            r"96 outputs of an expert are no multiple of 64; use a checkpoint with 16-bit",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        traced(config | {"quantization_config": compressed()}).lower()


@pytest.mark.parametrize("said", [None, compressed(), modelopt()], ids=["nvfp4", "compressed", "modelopt"])
def test_projections_merge_and_fuse_as_wide_ones_do(said: dict[str, Any] | None) -> None:
    config = DENSE | ({"quantization_config": said} if said else {})
    lowered = traced(config, quant=None if said else "nvfp4").lower()
    config = DENSE | {"intermediate_size": 256}
    wide = traced(config).lower().programs
    packed = traced(
        config | ({"quantization_config": said} if said else {}), quant=None if said else "nvfp4"
    ).lower()
    for kind in (DECODE, EXTEND):
        assert [op.replace("linear_mx", "linear") for op in ops(packed.programs[kind])] == ops(wide[kind])
        # Gate and up of 208 outputs end within a tile, so each stays a product of its own.
        assert Counter(ops(lowered.programs[kind]))["linear_mx"] == 5 * DENSE["num_hidden_layers"]


@pytest.mark.parametrize("said", [None, compressed(), modelopt()], ids=["nvfp4", "compressed", "modelopt"])
def test_experts_keep_their_gate(said: dict[str, Any] | None) -> None:
    config = MIXTURE | ({"quantization_config": said} if said else {})
    counted = Counter(ops(traced(config, quant=None if said else "nvfp4").lower().programs[DECODE]))
    layers = MIXTURE["num_hidden_layers"]
    assert (counted["grouped_silu_mul_mx"], counted["grouped_linear_mx"]) == (layers, layers)
    assert counted["linear"] == layers + 1  # routers, and the head


def test_memory_is_what_is_packed() -> None:
    """4 bits a weight and 16 for two blocks, of whole spans and tiles, and 32 an output."""
    plan = compile_plan(dummy(DENSE | {"quantization_config": compressed()}), **LIMITS)
    kv, inner, layers = 64, DENSE["intermediate_size"], DENSE["num_hidden_layers"]
    shapes = [(128, 128), (kv, 128), (kv, 128), (128, 128), (inner, 128), (inner, 128), (128, inner)]
    by_dtype = plan.memory_analysis()["weights_by_dtype"]
    words = sum(n * -(-k // 128) * 64 for n, k in shapes)
    scales = sum(-(-n // 64) * 64 * -(-k // 32) * 2 for n, k in shapes)
    assert by_dtype["int16"] == layers * (words + scales)
    wholes = [w for w in plan.weights if w.param.name.endswith("_global_scale")]
    assert sum(w.nbytes for w in wholes) == layers * 4 * sum(n for n, _ in shapes)


@pytest.mark.parametrize("said", [compressed(), modelopt()], ids=["compressed", "modelopt"])
def test_dummy_weights_are_as_large_as_others(said: dict[str, Any]) -> None:
    checkpoint = dummy(DENSE | {"quantization_config": said})
    compile_plan(checkpoint, **LIMITS)
    divides = said["quant_method"] == "compressed-tensors"
    name = "model.layers.0.mlp.up_proj"
    numbers = checkpoint.read(f"{name}.{'weight_packed' if divides else 'weight'}")
    scales = checkpoint.read(f"{name}.weight_scale")
    (whole,) = checkpoint.read(f"{name}.{'weight_global_scale' if divides else 'weight_scale_2'}").reshape(-1)
    assert (numbers.shape, scales.shape) == ((208, 64), (208, 8))
    assert checkpoint.tensors[f"{name}.weight_scale"].dtype == "float8_e4m3fn"
    assert len(np.unique(numbers)) == 256
    wide = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[
        np.stack((numbers & 7, numbers >> 4 & 7), -1).reshape(208, 128)
    ]
    own = torch.from_numpy(scales.view(np.uint8)).view(torch.float8_e4m3fn).double().numpy()
    wide = wide * own.repeat(16, 1) * (1 / whole if divides else whole)
    assert 0.01 < np.sqrt((wide**2).mean()) < 0.04


def test_a_file_beside_the_config_is_read(tmp_path: Path) -> None:
    """Unless config.json says itself how it is quantized."""
    save_file({"lm_head.weight": torch.ones(61, 128)}, tmp_path / "model.safetensors")
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(in_a_file()))
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    scheme = stored_scheme(open_checkpoint(tmp_path).config)
    assert isinstance(scheme, WeightOnly)
    assert scheme.of(UP) == Form(4, 16)
    (tmp_path / "config.json").write_text(json.dumps(DENSE | {"quantization_config": modelopt("FP8")}))
    assert stored_scheme(open_checkpoint(tmp_path).config) == Scheme("tensor", static=True, stored=True)
