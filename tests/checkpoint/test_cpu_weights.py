"""Weights for the CPU in ranges of rows, out of GGUF files and folders, against the tensors that were written."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import LLAMA, state_dict, write_folder, write_gguf

from makeready.graphs.checkpoint import CheckpointError, open_checkpoint
from makeready.graphs.executable.cpu import weights as cpu_weights
from makeready.graphs.planner.compile import compile_plan
from makeready.kernels.gemm import linear_cpu

pytestmark = pytest.mark.skipif(not linear_cpu.packs(), reason="PyTorch was built without FBGEMM")


def loaded(checkpoint, **request):
    plan = compile_plan(checkpoint, target="cpu", max_rows=2, max_tokens=16, context_len=64, **request)
    seen: list[int] = []
    found = cpu_weights.load_weights(plan, checkpoint, lambda done, total: seen.append(done))
    assert seen == sorted(seen)
    assert seen[-1] == len(plan.weights) == len(found)
    return found


@pytest.mark.parametrize("rows", [7, 32, 10_000])
@pytest.mark.parametrize("form", ["gguf", "bfloat16"])
def test_ranges_that_cross_tensors_are_put_together(tmp_path, monkeypatch, form, rows):
    state = state_dict(LLAMA)
    if form == "gguf":
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", LLAMA, state))
        stored = {name: x.half().float() for name, x in state.items()}
    else:
        state = {name: x.bfloat16() for name, x in state.items()}
        checkpoint = open_checkpoint(write_folder(tmp_path, LLAMA, state))
        stored = {name: x.float() for name, x in state.items()}
    monkeypatch.setattr(cpu_weights, "part_rows", lambda inputs: rows)
    found = loaded(checkpoint, weight_dtype="float16" if form == "gguf" else "bfloat16")
    layer = "model.layers.0."
    wanted = {
        "layers.0.attention.q+k+v": [f"{layer}self_attn.{n}_proj.weight" for n in "qkv"],
        "layers.0.mlp.gate+up": [f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up")],
        "layers.0.mlp.down": [f"{layer}mlp.down_proj.weight"],
    }
    for name, sources in wanted.items():
        (packed,) = [x for key, x in found.items() if key.startswith(f"{name}.weight")]
        expected = torch.cat([stored[source] for source in sources])
        assert len(packed.parts) == -(-len(expected) // rows)
        assert torch.allclose(packed.multiply(torch.eye(expected.shape[1])).T, expected, rtol=0, atol=3e-8)


def test_threads_stay_as_many_as_they_were(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loaded(open_checkpoint(write_folder(tmp_path, LLAMA, state_dict(LLAMA))))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path, number):
    state = {name: x.bfloat16() for name, x in state_dict(LLAMA).items()}
    state["model.layers.1.mlp.down_proj.weight"][3, 4] = number
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight .*holds NaN or an infinite"
    ):
        loaded(open_checkpoint(write_folder(tmp_path, LLAMA, state)), weight_dtype="bfloat16")


def test_a_bf16_weight_beyond_fp16_loads(tmp_path):
    state = {name: x.bfloat16() for name, x in state_dict(LLAMA).items()}
    name = "model.layers.1.mlp.down_proj.weight"
    state[name][3, 4] = 3e30
    found = loaded(open_checkpoint(write_folder(tmp_path, LLAMA, state)), weight_dtype="bfloat16")
    (packed,) = [x for key, x in found.items() if key.startswith("layers.1.mlp.down.weight")]
    made = packed.multiply(torch.eye(state[name].shape[1])).T
    assert made[3, 4] == state[name][3, 4].float()
    others = torch.arange(len(made)) != 3
    assert torch.allclose(made[others], state[name][others].float(), rtol=0, atol=3e-8)
