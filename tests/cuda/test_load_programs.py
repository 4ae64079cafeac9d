"""Load programs get kernels like a step's programs do."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("triton")

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.planner.compile import compile_plan, trace_checkpoint
from makeready.graphs.planner.cuda.emit import emit
from makeready.graphs.planner.cuda.table import resource_table
from makeready.graphs.planner.lower import place_weights
from makeready.graphs.planner.request import Request
from makeready.graphs.quant.loading import loading_of
from makeready.graphs.quant.scheme import ON_LOAD

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
Smoothed = runpy.run_path(str(Path(__file__).parents[1] / "gpu" / "smoothed.py"))["Smoothed"]


def test_every_call_of_a_derivation_has_a_kernel(monkeypatch):
    monkeypatch.setitem(ON_LOAD, "smoothed", Smoothed())
    plan = compile_plan(
        DummyCheckpoint(dict(CONFIG)),
        target="sm_90a",
        quant="smoothed",
        max_rows=1,
        max_tokens=16,
        page_size=16,
        max_decode_buckets=1,
        max_extend_buckets=1,
    )
    assert plan.loading is not None
    (load,) = plan.loading.programs
    assert [launch.op for launch in load.program.launches] == ["multiply", "quantize_fp8"]
    pointed = []
    for launch in load.program.launches:
        one = load.program.classes[launch.op_class]
        (choice,) = one.candidates[str(load.bucket)]
        names = {**launch.operands, **launch.results}
        arguments = [a for node in choice.nodes for a in node.arguments if a.kind == "pointer"]
        pointed.append([names[a.operand] for a in arguments])
        assert all(node.binary in plan.cubins for node in choice.nodes)
    results = {result: made.name for result, made in load.results.items()}
    # The value between the two lies in the arena, what they make where parameters are.
    assert pointed[0][:2] == ["x", "y"]
    assert pointed[0][2] == pointed[1][0]
    assert pointed[0][2] in load.program.buffers
    assert set(pointed[1][1:]) == set(results.values())
    assert "multiply" in resource_table(plan)


# V3's attention in small, its projections in blocks.
LATENT = {
    **CONFIG,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def test_weights_that_must_be_wide_have_a_kernel(tmp_path):
    """Compiled as a load program by itself, since the model's attention need not have kernels for that."""
    traced = trace_checkpoint(
        DummyCheckpoint(dict(LATENT)), Request(target="sm_90a", max_rows=1, max_tokens=16)
    )
    params = [p for p in traced.programs["decode"].params.values() if p.name.endswith("kv_b")]
    weights, _ = place_weights(params)
    loading = loading_of(weights, traced.target)
    assert loading is not None
    (load,) = loading.programs
    assert [launch.op for launch in load.program.launches] == ["dequantize_fp8_block"]
    assert {made.spec.dtype for made in load.results.values()} == {"bfloat16"}
    emitted = emit(
        {load.program.phase: load.program},
        {load.program.phase: {made.name: made.spec for made in load.results.values()}},
        (load.bucket,),
        traced.target,
        context=1,
        keep=1,
        cache=tmp_path,
        loads={load.program.phase},
    )
    assert emitted.cubins
