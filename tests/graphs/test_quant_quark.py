"""Quark's configs: MXFP4 and FP8 are what other files of them are, and the rest is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tiny_programs import LIMITS, LLAMA, dummy

from makeready.graphs.checkpoint.base import CheckpointWarning
from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.quant.scheme import Scheme
from makeready.graphs.quant.stored import stored_scheme
from makeready.graphs.quant.weight_only import Form, WeightOnly

FP4: dict[str, Any] = {
    "dtype": "fp4",
    "qscheme": "per_group",
    "ch_axis": -1,
    "group_size": 32,
    "scale_format": "e8m0",
    "is_dynamic": False,
    "round_method": "half_even",
}
TENSOR: dict[str, Any] = {
    "dtype": "fp8_e4m3",
    "qscheme": "per_tensor",
    "ch_axis": None,
    "is_dynamic": False,
    "symmetric": True,
}
CHANNEL, TOKEN = (
    {**TENSOR, "qscheme": "per_channel", "ch_axis": 0},
    {**TENSOR, "qscheme": "per_channel", "ch_axis": 1, "is_dynamic": True},
)
Q, UP = "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj"


def entry(weight: Any = FP4, inputs: Any = None, **more: Any) -> dict[str, Any]:
    return {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None, **more}


def quark(usual: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    made = {"weight_format": "real_quantized", "pack_method": "reorder", "kv_cache_group": []}
    said = {
        "quant_method": "quark",
        "global_quant_config": entry() if usual is None else usual,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {**made, **more.pop("export", {})},
    }
    return {**said, **more}


@pytest.mark.parametrize(
    ("said", "module", "form"),
    [
        (quark(), Q, Form(4, 32)),
        (quark(), "lm_head", None),
        (quark(exclude=["model.layers.3.mlp.up_proj", "*k_proj"]), UP, None),
        (quark(exclude=["model.layers.3.mlp.up_proj", "*q_proj"]), Q, None),
        (quark(exclude=["re:.*mlp.*"]), UP, None),
        (quark(layer_quant_config={"*self_attn*": entry(None)}), Q, None),
        (quark(layer_quant_config={"*self_attn*": entry(None)}), UP, Form(4, 32)),
        (quark(entry(None), layer_quant_config={"*mlp*": entry()}), UP, Form(4, 32)),
        (quark(entry(None), layer_quant_config={"*mlp*": entry()}), Q, None),
        (quark(entry({**FP4, "ch_axis": 1}), algo_config=[{"name": "awq"}]), UP, Form(4, 32)),
    ],
)
def test_mxfp4_is_read(said: dict[str, Any], module: str, form: Form | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheme = stored_scheme({"quantization_config": said})
    assert isinstance(scheme, WeightOnly)
    assert (scheme.kind, scheme.of(module)) == ("mxfp4", form)


CACHED = entry(TENSOR, TENSOR, output_tensors=TENSOR)


@pytest.mark.parametrize(
    ("said", "scheme"),
    [
        (quark(entry(TENSOR, TENSOR)), Scheme("tensor", static=True, stored=True)),
        (quark(entry(CHANNEL, TOKEN)), Scheme("channel", stored=True)),
        (quark(entry(CHANNEL, TENSOR)), Scheme("channel", static=True, stored=True)),
        (
            quark(
                entry(TENSOR, TENSOR),
                layer_quant_config={"*k_proj": CACHED, "*v_proj": CACHED},
                export={"kv_cache_group": ["*k_proj", "*v_proj"]},
            ),
            Scheme("tensor", static=True, stored=True),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the cache has the dtype")
def test_fp8_is_read(said: dict[str, Any], scheme: Scheme) -> None:
    assert stored_scheme({"quantization_config": said}) == scheme


def test_fp8_has_modules_that_stay_wide() -> None:
    scheme = stored_scheme(
        {"quantization_config": quark(entry(TENSOR, TENSOR), exclude=["*mlp*", "lm_head"])}
    )
    assert isinstance(scheme, Scheme)
    assert [scheme.covers(module) for module in (Q, UP, "lm_head")] == [True, False, False]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            quark(entry(FP4, {**FP4, "is_dynamic": True})),
            "activations of 4 bits are not computed here.*W4A16",
        ),
        (
            quark(
                entry(TENSOR, TENSOR),
                layer_quant_config={"*k_proj": CACHED},
                export={"kv_cache_group": ["*k_proj"]},
            ),
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
        (
            quark(entry({**FP4, "group_size": 16})),
            "fp4 weights must be per_group, of 32 inputs with scale_format",
        ),
        (quark(entry({**FP4, "scale_format": "float32"})), "fp4 weights must be per_group, of 32 inputs"),
        (quark(entry({**FP4, "qscheme": "per_channel"})), "fp4 weights must be per_group"),
        (quark(entry({**FP4, "ch_axis": 0})), "fp4 weights must be per_group"),
        (quark(entry({**FP4, "is_dynamic": True})), "weights must not be dynamic"),
        (quark(entry(FP4, TENSOR)), "input_tensors beside fp4 weights must be absent, or fp4 and dynamic"),
        (quark(entry([TENSOR, {"dtype": "int4"}], TENSOR)), "quark's weight must be one object; use a"),
        (quark(entry(None, TENSOR)), "quark's weight must be one object; use a"),
        (
            quark(entry({**TENSOR, "dtype": "int8"}, TENSOR)),
            "quark's weights of 'int8' are not supported; use",
        ),
        (quark(entry({**FP4, "dtype": "fp6_e2m3"})), "quark's weights of 'fp6_e2m3' are not supported"),
        (quark(entry(TENSOR)), "input_tensors beside fp8_e4m3 weights must be fp8_e4m3"),
        (
            quark(entry(TENSOR, {**TENSOR, "is_dynamic": True})),
            "input_tensors beside fp8_e4m3 weights must be",
        ),
        (quark(entry({**CHANNEL, "ch_axis": 1}, TOKEN)), "must be per_tensor, or per_channel with ch_axis 0"),
        (quark(entry({**TENSOR, "scale_format": "e8m0"}, TENSOR)), "scale_format 'e8m0' of fp8_e4m3"),
        (
            quark(entry(TENSOR, TENSOR), layer_quant_config={"*k_proj": CACHED}),
            "output_tensors are not supported",
        ),
        (quark(entry(FP4, bias=TENSOR)), "quark's bias is not supported"),
        (
            quark(entry(TENSOR, TENSOR), layer_quant_config={"*mlp*": entry()}),
            "quark's FP8 must be the same in all layers",
        ),
        (quark(entry(None)), "quark quantizes no weights"),
        (quark(layer_type_quant_config={"Linear": entry()}), "layer_type_quant_config is not supported"),
        (quark(export={"weight_format": "fake_quantized"}), "weight_format 'fake_quantized' of quark is not"),
        (quark(algo_config=[{"name": "rotation"}]), "algo_config 'rotation' of quark is not supported"),
        (quark(layer_quant_config={"*mlp*": "fp4"}), "must be an object; correct config.json"),
        (quark(layer_quant_config=["*mlp*"]), "layer_quant_config must be an object; correct config.json"),
        ({"quant_method": "quark"}, "quark quantizes no weights"),
    ],
)
def test_other_configs_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        compile_plan(dummy(LLAMA | {"quantization_config": said}), **LIMITS)
    assert "\n" not in str(caught.value)
