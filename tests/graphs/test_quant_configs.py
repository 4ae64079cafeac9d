"""8 bits: what checkpoints' configs mean, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from quant_configs import BLOCKS, CHANNEL, HEAD, INT8, TENSOR, TOKEN, compressed, integers, mixed
from tiny_programs import LIMITS, LLAMA, dummy

from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.quant.scheme import Scheme
from makeready.graphs.quant.stored import stored_scheme


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
