"""Weights that are quantized on their way in: rows, slots, launches and places, with kernels that really run."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from fake_driver import FakeBindings, FakeNode, real
from plans import CONFIG, make_plan
from test_cuda_weights import check_loaded, write_folder

from makeready.graphs import artifact
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable import cuda_weights
from makeready.graphs.executable.cuda import CudaExecutable
from makeready.graphs.executable.cuda_driver import Driver, DriverError, host_bytes
from makeready.graphs.quant import loading
from makeready.kernels.contract import CONTRACTS

BLOCKY = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}


@pytest.fixture
def small(monkeypatch):
    """Chunks of a few rows, and pinned buffers smaller than they are."""
    monkeypatch.setattr(loading, "SLOT_BYTES", 3000)
    monkeypatch.setattr(loading, "ROWS", 4)
    monkeypatch.setattr(loading, "SLOTS", 3)
    monkeypatch.setattr(cuda_weights, "CHUNK", 1000)
    monkeypatch.setattr(cuda_weights, "READ", 3000)


class Quantizer:
    """Does what the kernels of ``plans.with_kernels`` are called after, in the fake's memory.

    Attributes:
        launched: how often each kernel ran.
        operands: addresses that were read.
    """

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()
        self.operands: set[int] = set()
        self.lock = threading.Lock()

    def __call__(self, node: FakeNode) -> None:
        x, q, scale, rows, columns, size = node.words()[:6]
        op = node.function.name.rpartition("_")[0]
        with self.lock:
            self.launched[node.function.name] += 1
            self.operands.add(x)
        source = torch.from_numpy(host_bytes(x, 2 * rows * columns)).view(torch.bfloat16).view(rows, columns)
        made = CONTRACTS[op].reference(source, **{next(iter(CONTRACTS[op].attrs)): size})
        for place, value in zip((q, scale), made, strict=True):
            raw = value.contiguous().view(torch.uint8).numpy().reshape(-1)
            host_bytes(place, raw.nbytes)[:] = raw


def dummy(config: dict[str, Any] = CONFIG) -> DummyCheckpoint:
    return DummyCheckpoint(dict(config), None, 0)


def test_every_chunk_lands_where_the_whole_would(small):
    quantizer = Quantizer()
    plan = check_loaded(dummy(), FakeBindings(on_kernel=quantizer), quant="fp8")
    made = plan.loading
    chunks = [index for conversion in made.conversions for index in conversion.launches]
    assert sum(quantizer.launched.values()) == len(chunks) > 20
    assert len(quantizer.operands) <= made.slots == 3
    assert len(made.program.launches) < len(chunks)
    # q, k and v of 64, 32 and 32 rows in chunks of 20: some chunks hold rows of two of them.
    (first, *_) = made.conversions
    assert [piece.at for piece in first.pieces] == [0, 64, 96]
    rows = [
        made.program.buffers[made.program.launches[i].operands["x"]].spec.at({})[0] for i in first.launches
    ]
    assert rows == [20] * 6 + [8]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_files_are_read_by_chunks(small, tmp_path, stored):
    quantizer = Quantizer()
    check_loaded(write_folder(tmp_path, stored), FakeBindings(on_kernel=quantizer), quant="fp8")
    assert sum(quantizer.launched.values()) > 20


def test_blocks_are_whole_but_for_the_last(small):
    """Of 128 rows; k's and v's 64 rows are chunks, and blocks, of their own."""
    config = BLOCKY | {"head_dim": 32}
    quantizer = Quantizer()
    plan = check_loaded(dummy(config), FakeBindings(on_kernel=quantizer), quant="fp8_block")
    assert {op.rpartition("_")[0] for op in quantizer.launched} == {"quantize_fp8_block"}
    rows = [
        plan.loading.program.buffers[launch.operands["x"]].spec.at({})[0]
        for launch in plan.loading.program.launches
    ]
    assert sorted(rows) == [64, 128, 128]


def test_chunks_of_the_usual_size(tmp_path):
    quantizer = Quantizer()
    plan = check_loaded(
        write_folder(tmp_path, torch.bfloat16), FakeBindings(on_kernel=quantizer), quant="fp8"
    )
    assert all(len(conversion.launches) == 1 for conversion in plan.loading.conversions)
    assert plan.memory.arena >= plan.loading.slots * plan.loading.slot_bytes


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


def test_addresses_are_multiples_of_what_kernels_were_compiled_for(small):
    plan = make_plan(dummy(), quant="fp8")
    program = plan.loading.program
    for conversion in plan.loading.conversions:
        at = dict(conversion.results)
        for index in conversion.launches:
            launch = program.launches[index]
            for name, offset in at.items():
                buffer = program.buffers[launch.results[name]]
                assert offset % np.gcd(buffer.offset, 256) == 0
                at[name] += buffer.spec.nbytes({})


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
