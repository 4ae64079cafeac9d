"""Plans over a GGUF file's blocks: which weights stay as they are stored, and which file a plan is for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_files import LLAMA, state_dict, write_quantized

from makeready.graphs.checkpoint.base import CheckpointError, CheckpointWarning, open_checkpoint
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.planner.compile import compile_plan
from makeready.graphs.planner.plan_cache import plan_key
from makeready.graphs.planner.request import Request

TYPES = gguf.GGMLQuantizationType
SMALL = {"max_rows": 2, "max_tokens": 8, "max_decode_buckets": 1, "max_extend_buckets": 1}
STORED = SMALL | {"quant": "stored"}


def quantized(path: Path, kinds: dict[str, TYPES]) -> Path:
    """A tiny Llama."""
    config = LLAMA | {"tie_word_embeddings": False}
    return write_quantized(path, config, state_dict(config), kinds)


def launches(plan: Plan, op: str) -> list[dict]:
    return [dict(launch.attrs) for launch in plan.programs["decode"].launches if launch.op == op]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    kinds = {"attn_q": TYPES.Q4_0, "attn_k": TYPES.Q4_0, "attn_v": TYPES.Q8_0, "attn_output": TYPES.Q4_1}
    kinds |= {"ffn_gate": TYPES.Q5_1, "ffn_up": TYPES.Q5_1, "token_embd": TYPES.Q5_0, "output": TYPES.Q8_0}
    return quantized(tmp_path_factory.mktemp("mixed") / "m.gguf", kinds)


def test_projections_merge_though_their_types_differ(mixed):
    plan = compile_plan(mixed, **STORED)
    rows = [attrs["rows"] for attrs in launches(plan, "linear_gguf")]
    layer = ["q4_0*192+q4_0*64+q8_0*64", "q4_1*96", "q5_1*64+q5_1*64"]
    assert rows == [*layer, *layer, "q8_0*97"]
    assert [attrs["rows"] for attrs in launches(plan, "embedding_gguf")] == ["q5_0*97"]
    assert len(launches(plan, "linear")) == 2  # ffn_down is fp32
    assert {launch.op for launch in plan.programs["decode"].launches} >= {"norm_rope_kv_write", "silu_mul"}


def test_bytes_are_those_of_the_file(mixed):
    """Rows of q and k in the order of Hugging Face; what needs no other order is a view of the mapped file."""
    plan, checkpoint = compile_plan(mixed, **STORED), open_checkpoint(mixed)
    reader = {t.name: t for t in gguf.GGUFReader(mixed).tensors}
    for name, kind in (("o_proj", "q4_1"), ("v_proj", "q8_0")):
        source = f"model.layers.1.self_attn.{name}.weight#{kind}"
        stored = checkpoint.read(source)
        tensor = reader[f"blk.1.attn_{'output' if name == 'o_proj' else 'v'}.weight"]
        np.testing.assert_array_equal(stored, tensor.data.reshape(-1).view(np.uint8))
        assert stored.base is not None
        np.testing.assert_array_equal(checkpoint.read(source, slice(7, 300)), stored[7:300])
    q = checkpoint.read("model.layers.0.self_attn.q_proj.weight#q4_0").reshape(192, -1)
    wanted = checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_array_equal(gguf.quants.dequantize(q, TYPES.Q4_0), wanted)
    with pytest.raises(CheckpointError, match="no tensor"):
        checkpoint.read("model.layers.0.self_attn.q_proj.weight#q8_0")
    streamed = sum(w.nbytes for w in plan.weights if ".blocks" in w.param.name)
    assert streamed == sum(t.n_bytes for t in reader.values() if t.tensor_type not in (TYPES.F32,))


@pytest.mark.parametrize("asked", [{}, {"weight_dtype": "float32"}, {"quant": "fp8"}])
def test_who_asks_for_something_else_gets_it(asked, mixed):
    plan = compile_plan(mixed, **SMALL, **asked)
    assert not launches(plan, "linear_gguf")
    assert not launches(plan, "embedding_gguf")


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
def test_where_there_are_no_blocks_it_is_refused(target, tmp_path):
    with pytest.raises(PlanError, match=r"multiplies GGUF's blocks as they are, and .* has none"):
        compile_plan(quantized(tmp_path / "m.gguf", {}), **STORED, target=target)


def test_types_without_products_are_widened(tmp_path):
    kind = TYPES.MXFP4
    path = quantized(tmp_path / "m.gguf", {"ffn_gate": kind, "attn_q": TYPES.Q4_0})
    with pytest.warns(CheckpointWarning, match="blocks of mxfp4 are widened"):
        plan = compile_plan(path, **STORED)
    assert {attrs["rows"] for attrs in launches(plan, "linear_gguf")} == {"q4_0*192"}
    widened = [w.param.spec.dtype for w in plan.weights if "gate" in w.param.name]
    assert set(widened) == {"float16"}


def test_a_plan_is_for_files_of_its_types(mixed, tmp_path):
    other = quantized(tmp_path / "m.gguf", {"attn_q": TYPES.Q8_0})
    plan, checkpoint = compile_plan(mixed, **STORED), open_checkpoint(other)
    with pytest.raises(PlanError, match=r"another checkpoint.*lacks it"):
        load_executable(plan, checkpoint)
    assert plan_key(checkpoint, Request(quant="stored")) != plan_key(
        open_checkpoint(mixed), Request(quant="stored")
    )
    assert plan.checkpoint != compile_plan(other, **STORED).checkpoint


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("linear_gguf", {"rows": "q4_0*192+q4_0*64+q8_0*65"}),
        ("linear_gguf", {"rows": "q8_0*192+q8_0*64+q8_0*64"}),
        ("linear_gguf", {"outputs": 319}),
        ("embedding_gguf", {"rows": "q5_0*96"}),
        ("embedding_gguf", {"width": 32}),
    ],
)
def test_plans_that_say_something_else_of_blocks_are_refused(op, change, mixed):
    plan = compile_plan(mixed, **STORED)
    launch = next(one for one in plan.programs["decode"].launches if one.op == op)
    launch.attrs.update(change)  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="contradicts itself"):
        load_executable(plan, open_checkpoint(mixed))
