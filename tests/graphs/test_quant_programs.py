"""8 bits: what programs and parameters become, and what cannot be quantized."""

from __future__ import annotations

from collections import Counter

import pytest
from quant_configs import BLOCKS, CHANNEL, LAYERS, MIXTURE, TOKEN, WIDE, integers
from tiny_programs import LIMITS, LLAMA, dummy, ops, traced

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.planner.compile import compile_plan, trace_checkpoint
from makeready.graphs.planner.request import Request


@pytest.mark.parametrize(
    ("config", "request_", "message"),
    [
        (
            LLAMA,
            {"quant": "int3"},
            "quant=int3 is not supported; choose one of fp8, fp8_block, int4, int8, mxfp4, nvfp4, stored",
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


def test_plans_of_other_quantizations_have_other_digests():
    digests = {
        compile_plan(dummy(WIDE), **LIMITS, quant=quant).digest
        for quant in (None, "fp8", "fp8_block", "int8")
    }
    assert len(digests) == 4


def test_a_plan_says_what_is_quantized():
    plan = compile_plan(dummy(WIDE), **LIMITS, quant="fp8")
    assert "linears f8_e4m3fn, other weights f32" in plan.as_text()
    memory = plan.memory_analysis()
    assert memory["stored_twice"] == 0  # a scale comes of the same rows as its weight
    assert memory["parameters"] == compile_plan(dummy(WIDE), **LIMITS).memory_analysis()["parameters"]
