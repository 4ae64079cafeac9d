"""MXFP4 in files and while loading: what configs mean, what plans become, what is refused, dummy weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from tiny_programs import LIMITS, LLAMA, dummy, ops, traced

from makeready.graphs.checkpoint.base import CheckpointWarning
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.quant.stored import stored_scheme
from makeready.graphs.quant.weight_only import Form, WeightOnly

MXFP4: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
CONFIG = LLAMA | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 192,
    "intermediate_size": 160,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "quantization_config": MXFP4,
}


@pytest.mark.parametrize(
    ("more", "module", "form"),
    [
        ([], "model.layers.3.mlp.experts.7.gate_proj", Form(4, 32)),
        ([], "model.layers.3.self_attn.q_proj", None),
        ([], "model.layers.3.mlp.router", None),
        ([], "lm_head", None),
        (["model.layers.1.mlp"], "model.layers.1.mlp.experts.0.down_proj", None),
        (["model.layers.1.mlp"], "model.layers.11.mlp.experts.0.down_proj", Form(4, 32)),
        (["model.layers.*.mlp.experts"], "model.layers.11.mlp.experts.0.down_proj", None),
        (["layers.1"], "model.layers.1.mlp.experts.0.down_proj", None),
    ],
)
def test_configs_are_read(more: list[str], module: str, form: Form | None) -> None:
    said = {**MXFP4, "modules_to_not_convert": [*MXFP4["modules_to_not_convert"], *more]}
    scheme = stored_scheme({"quantization_config": said})
    assert isinstance(scheme, WeightOnly)
    assert scheme.of(module) == form


def test_experts_are_packed_and_fused() -> None:
    plan = compile_plan(dummy(CONFIG), **LIMITS)
    for kind in (DECODE, EXTEND):
        count = Counter(launch.op for launch in plan.programs[kind].launches)
        assert count["grouped_clamped_swiglu_mx"] == count["grouped_linear_mx"] == CONFIG["num_hidden_layers"]
        assert not {"grouped_linear", "clamped_swiglu"} & set(count)
    found = {
        w.param.name: w.param.spec for w in plan.weights if w.param.name.startswith("layers.0.mlp.gate_up")
    }
    shapes = {name.rpartition(".")[2]: (spec.shape, spec.dtype) for name, spec in found.items()}
    assert shapes == {
        "gate_up": ((4, 320, 64), "int16"),
        "gate_up_scale": ((4, 5, 6, 64), "uint8"),
        "gate_up_bias": ((4, 320), "float32"),
    }


def test_dummy_weights_are_as_large_as_others() -> None:
    """Bits that fill all numbers, under scales that give the usual deviation of 0.02."""
    checkpoint = dummy(CONFIG)
    compile_plan(checkpoint, **LIMITS)
    blocks = checkpoint.read("model.layers.0.mlp.experts.1.gate_proj.weight_blocks")
    scales = checkpoint.read("model.layers.0.mlp.experts.1.gate_proj.weight_scales")
    assert (blocks.shape, scales.shape) == ((160, 96), (160, 6))
    assert blocks.dtype == scales.dtype == np.uint8
    assert len(np.unique(blocks)) == 256
    assert set(np.unique(scales)) == {119, 120, 121}
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[
        np.stack((blocks & 7, blocks >> 4 & 7), -1).reshape(160, 192)
    ]
    wide = numbers * np.exp2(scales.astype(float) - 127).repeat(32, 1)
    assert 0.015 < np.sqrt((wide**2).mean()) < 0.035


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 208},
            "208 inputs are no multiple of MXFP4's blocks of 32; use a checkpoint with 16-bit",
        ),
        (
            {"hidden_size": 224},
            "224 outputs of an expert are no multiple of 64; use a checkpoint with 16-bit",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        traced(CONFIG | changes).lower()
    assert "\n" not in str(caught.value)


def test_names_are_checked() -> None:
    with pytest.raises(UnsupportedModelError, match="modules_to_not_convert must be a list of names"):
        stored_scheme({"quantization_config": {**MXFP4, "modules_to_not_convert": "lm_head"}})


DENSE = LLAMA | {
    "hidden_size": 128,
    "intermediate_size": 192,
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


def compressed(weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    usual = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    usual["scale_dtype"] = "torch.uint8"
    group = {"targets": ["Linear"], "weights": {**usual, **(weights or {})}, **more.pop("group", {})}
    made = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["lm_head"]}
    return {**made, "config_groups": {"group_0": group}, **more}


@pytest.mark.parametrize(
    ("said", "module", "form"),
    [
        (compressed(), "model.layers.3.self_attn.q_proj", Form(4, 32)),
        (compressed(), "lm_head", None),
        (compressed(ignore=["re:.*q_proj$"]), "model.layers.3.self_attn.q_proj", None),
        (compressed(group={"targets": ["re:.*mlp.*"]}), "model.layers.3.self_attn.q_proj", None),
        (compressed(group={"targets": ["re:.*mlp.*"]}), "model.layers.3.mlp.up_proj", Form(4, 32)),
        (compressed({"scale_dtype": None}), "model.layers.3.mlp.up_proj", Form(4, 32)),
    ],
)
def test_configs_of_compressed_tensors_are_read(said: dict[str, Any], module: str, form: Form | None) -> None:
    scheme = stored_scheme({"quantization_config": said})
    assert isinstance(scheme, WeightOnly)
    assert scheme.of(module) == form


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (compressed({"group_size": 16}), "must be symmetric, of 4 bits in groups of 32"),
        (compressed({"num_bits": 6}), "must be symmetric, of 4 bits in groups of 32"),
        (compressed({"symmetric": False}), "must be symmetric, of 4 bits in groups of 32"),
        (compressed({"type": "int"}), "type 'int' is not supported; use a checkpoint with float"),
        (compressed({"strategy": "tensor_group"}), "strategy 'tensor_group' is not supported"),
        (compressed({"actorder": "group"}), "actorder of mxfp4-pack-quantized is not supported"),
        (
            compressed(group={"input_activations": {"num_bits": 8, "type": "float"}}),
            "input_activations beside mxfp4-pack-quantized weights are not supported",
        ),
    ],
)
def test_other_configs_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        compile_plan(dummy(DENSE | {"quantization_config": said}), **LIMITS)
    assert "\n" not in str(caught.value)


def test_activations_of_4_bits_stay_wide_and_it_is_told() -> None:
    said = compressed(group={"input_activations": {"num_bits": 4, "type": "float", "dynamic": True}})
    with pytest.warns(
        CheckpointWarning, match=r"activations of 4 bits are not computed here, they stay .*W4A16"
    ):
        scheme = stored_scheme({"quantization_config": said})
    assert scheme == stored_scheme({"quantization_config": compressed()})


@pytest.mark.parametrize("said", [None, compressed()], ids=["mxfp4", "compressed"])
def test_projections_merge_and_fuse_as_wide_ones_do(said: dict[str, Any] | None) -> None:
    config = DENSE | ({"quantization_config": said} if said else {})
    programs = traced(config, quant=None if said else "mxfp4").lower().programs
    wide = traced(DENSE).lower().programs
    for kind in (DECODE, EXTEND):
        assert [op.replace("linear_mx", "linear") for op in ops(programs[kind])] == ops(wide[kind])
        assert Counter(ops(programs[kind]))["linear_mx"] == 4 * DENSE["num_hidden_layers"]


def test_experts_keep_their_gate() -> None:
    counted = Counter(ops(traced(MIXTURE, quant="mxfp4").lower().programs[DECODE]))
    layers = MIXTURE["num_hidden_layers"]
    assert (counted["grouped_silu_mul_mx"], counted["grouped_linear_mx"]) == (layers, layers)
    assert counted["linear"] == layers + 1  # routers, and the head


def test_memory_is_what_is_packed() -> None:
    """4 bits a weight and 8 a block, of whole spans and tiles."""
    plan = compile_plan(dummy(DENSE | {"quantization_config": compressed()}), **LIMITS)
    kv = DENSE["num_key_value_heads"] * 32
    shapes = [(128, 128), (kv, 128), (kv, 128), (128, 128), (192, 128), (192, 128), (128, 192)]
    by_dtype = plan.memory_analysis()["weights_by_dtype"]
    layers = DENSE["num_hidden_layers"]
    assert by_dtype["int16"] == layers * sum(n * -(-k // 128) * 64 for n, k in shapes)
    assert by_dtype["uint8"] == layers * sum(n * k // 32 for n, k in shapes)


def test_dummy_weights_of_compressed_tensors_are_as_large_as_others() -> None:
    checkpoint = dummy(DENSE | {"quantization_config": compressed()})
    compile_plan(checkpoint, **LIMITS)
    numbers = checkpoint.read("model.layers.0.mlp.up_proj.weight_packed")
    scales = checkpoint.read("model.layers.0.mlp.up_proj.weight_scale")
    assert (numbers.shape, scales.shape) == ((192, 64), (192, 4))
    assert numbers.dtype == scales.dtype == np.uint8
    assert set(np.unique(scales)) == {119, 120, 121}
