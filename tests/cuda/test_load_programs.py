"""Load programs get kernels like a step's programs do."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("triton")

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.planner.cuda.table import resource_table
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
