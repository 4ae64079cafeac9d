"""Weights that are quantized on their way in: rows, slots, launches and places, with kernels that really run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_files import LLAMA, add_tensors, finish_gguf, start_gguf, state_dict
from fake_driver import FakeBindings, real
from gguf import GGMLQuantizationType
from moe_models import gguf_file
from plans import CONFIG, Loader, make_plan
from reference import make_model
from stored_gguf import MIXED, Writer
from test_cuda_weights import check_loaded, write_folder

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.cuda import weights as cuda_weights
from makeready.graphs.executable.cuda.driver import Driver, DriverError
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.plan import artifact
from makeready.graphs.plan.program import LoadProgram
from makeready.graphs.quant import loading

BLOCKY = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}


@pytest.fixture
def small(monkeypatch):
    """Chunks of a few rows, and pinned buffers smaller than they are."""
    monkeypatch.setattr(loading, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(loading, "ROWS", 4)
    monkeypatch.setattr(loading, "LOADERS", 3)
    monkeypatch.setattr(cuda_weights, "CHUNK", 1000)
    monkeypatch.setattr(cuda_weights, "READ", 3000)


def dummy(config: dict[str, Any] = CONFIG) -> DummyCheckpoint:
    return DummyCheckpoint(dict(config), None, 0)


def test_every_chunk_lands_where_the_whole_would(small):
    loader = Loader()
    plan = check_loaded(dummy(), FakeBindings(on_kernel=loader), quant="fp8")
    made = plan.loading
    runs = [run for conversion in made.conversions for run in conversion.runs]
    assert sum(loader.launched.values()) == len(runs) > 20
    assert len(loader.operands) <= made.places == 3
    assert len(made.programs) < len(runs)
    # q, k and v of 64, 32 and 32 rows in runs of 20: some hold rows of two of them.
    (first, *_) = made.conversions
    (operand,) = plan.weights[first.results["q"]].param.operands
    assert [piece.at for piece in operand.pieces] == [(0, 0), (64, 0), (96, 0)]
    assert [stop for stop, _ in first.runs] == [20, 40, 60, 80, 100, 120, 128]
    assert [rows(made.programs[number]) for _, number in first.runs] == [20] * 6 + [8]


def rows(load: LoadProgram) -> int:
    """Of the operand."""
    return load.program.buffers["x"].spec.at({})[0]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_files_are_read_by_chunks(small, tmp_path, stored):
    loader = Loader()
    check_loaded(write_folder(tmp_path, stored), FakeBindings(on_kernel=loader), quant="fp8")
    assert sum(loader.launched.values()) > 20


def test_blocks_are_whole_but_for_the_last(small):
    """Of 128 rows; k's and v's 64 rows are chunks, and blocks, of their own."""
    config = BLOCKY | {"head_dim": 32}
    loader = Loader()
    plan = check_loaded(dummy(config), FakeBindings(on_kernel=loader), quant="fp8_block")
    assert {name.split("-")[1] for name in loader.launched} == {"quantize_fp8_block"}
    assert sorted(map(rows, plan.loading.programs)) == [64, 128, 128]


def test_chunks_of_the_usual_size(tmp_path):
    loader = Loader()
    plan = check_loaded(write_folder(tmp_path, torch.bfloat16), FakeBindings(on_kernel=loader), quant="fp8")
    assert all(len(conversion.runs) == 1 for conversion in plan.loading.conversions)
    assert plan.memory.arena >= plan.loading.places * plan.loading.place_bytes


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
    ],
    ids=["tensor", "block"],
)
def test_stored_scales_are_repeated_and_compared_on_the_way(small, said):
    """Nothing runs on the GPU where the checkpoint is quantized already."""
    bindings = FakeBindings()
    plan = check_loaded(dummy(CONFIG | {"quantization_config": said}), bindings)
    assert plan.loading is None
    assert "cuLaunchKernel" not in bindings.calls


def test_blocks_of_gguf_are_made_integers(small, tmp_path):
    """Types that differ within a layer, rows that the file has in another order, tiles that end early."""
    config = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    config |= {"vocab_size": 131, "tie_word_embeddings": False}
    writer = Writer(start_gguf(tmp_path / "m.gguf", "llama", config), MIXED)
    add_tensors(writer, "llama", config, state_dict(config))
    loader = Loader()
    path = finish_gguf(writer.writer)
    plan = check_loaded(open_checkpoint(path), FakeBindings(on_kernel=loader), quant="stored")
    assert {name.split("-")[1] for name in loader.launched} == {"repack_gguf", "scales_gguf", "offsets_gguf"}
    assert sum(len(conversion.runs) for conversion in plan.loading.conversions) > 40
    (operand, *_) = plan.loading.programs[0].program.buffers.values()
    assert operand.spec.dtype == "uint8"


def test_blocks_of_experts_are_made_integers(small, tmp_path):
    """Gates and ups of an expert lie one below the other, and the file has all experts' gates together."""
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    make_model(tmp_path, "qwen3_moe", **sizes)
    path = gguf_file(tmp_path, "qwen3moe", GGMLQuantizationType.Q4_1)
    loader = Loader()
    plan = check_loaded(open_checkpoint(path), FakeBindings(on_kernel=loader), quant="stored")
    assert sum(len(conversion.runs) for conversion in plan.loading.conversions) > 2 * 2 * 6
    assert sum("zero" in weight.param.name for weight in plan.weights) == 2 * 2


def test_addresses_are_multiples_of_what_kernels_were_compiled_for(small):
    plan = make_plan(dummy(), quant="fp8")
    least = set()
    for conversion in plan.loading.conversions:
        at = {result: plan.weights[index].offset for result, index in conversion.results.items()}
        for _, number in conversion.runs:
            load = plan.loading.programs[number]
            for result, offset in at.items():
                made = load.results[result]
                assert offset % load.program.alignments[made.name] == 0
                least.add(load.program.alignments[made.name])
                at[result] += made.spec.nbytes({})
    assert min(least) < 256 == max(least)


def test_a_refused_launch_reaches_the_caller_and_leaves_nothing(small):
    bindings = FakeBindings(refuse={"cuLaunchKernel": real.CUresult.CUDA_ERROR_LAUNCH_FAILED})
    checkpoint = dummy()
    with pytest.raises(DriverError, match="cuLaunchKernel failed with CUDA_ERROR_LAUNCH_FAILED"):
        CudaExecutable(make_plan(checkpoint, quant="fp8"), checkpoint, driver=Driver(bindings))
    bindings.check_released()


def test_plans_that_load_by_kernels_are_saved_and_read(small, tmp_path):
    plan = make_plan(dummy(), quant="fp8")
    artifact.save(plan, tmp_path / "plan")
    assert (tmp_path / "plan" / "loading.json").is_file()
    assert artifact.load(tmp_path / "plan") == plan
