"""Every way that parameters reach the GPU gives the bytes that the CPU executable's loader gives."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_driver import FakeBindings, real
from plans import CONFIG, Loader, dummy, make_plan
from safetensors.torch import save_file

from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.cpu.weights import load_weights
from makeready.graphs.executable.cuda import pages as cuda_pages
from makeready.graphs.executable.cuda import weights as cuda_weights
from makeready.graphs.executable.cuda.convert import convert
from makeready.graphs.executable.cuda.driver import Driver, DriverError
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.plan.plan import PlanError


@pytest.fixture
def small(monkeypatch):
    """Windows and buffers of a few pages, so that tiny weights need many of them."""
    monkeypatch.setattr(cuda_pages, "WINDOW", 4 * 4096)
    monkeypatch.setattr(cuda_pages, "MAPPED", 2 * 4096)
    monkeypatch.setattr(cuda_weights, "CHUNK", 1000)
    monkeypatch.setattr(cuda_weights, "READ", 3000)


def write_folder(folder, dtype: torch.dtype, *, shards: int = 1):
    """The tiny model's weights as safetensors."""
    torch.manual_seed(0)
    probe = make_plan(dummy(), kernels=False)
    shapes = {}
    for weight in probe.weights:
        for piece in weight.param.pieces:
            shapes[piece.source] = tuple(stop for _, stop in piece.box)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": str(dtype)[6:]}))
    names = sorted(tensors)
    files = [f"model-{i}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file)
    if shards == 1:
        (folder / files[0]).rename(folder / "model.safetensors")
    else:
        where = {name: files[names.index(name) % shards] for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return open_checkpoint(folder)


def check_loaded(checkpoint, bindings: FakeBindings, **request):
    """Load a plan for ``checkpoint`` and compare every parameter's bytes."""
    plan = make_plan(checkpoint, **request)
    if isinstance(bindings.on_kernel, Loader):
        bindings.on_kernel.plan = plan
    told: list[tuple[int, int]] = []
    executable = CudaExecutable(
        plan,
        checkpoint,
        driver=Driver(bindings),
        progress=lambda done, total: told.append((done, total)),
    )
    expected = load_weights(plan, checkpoint, lambda done, total: None)
    region = next(a for a in bindings.allocations.values() if len(a) == plan.memory.weights)
    for weight in plan.weights:
        raw = region[weight.offset : weight.offset + weight.nbytes]
        wanted = expected[weight.param.name].contiguous().view(torch.uint8).numpy().reshape(-1)
        assert np.array_equal(raw, wanted), weight.param.name
    assert told[-1] == (len(plan.weights), len(plan.weights))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    executable.close()
    bindings.check_released()
    return plan


@pytest.mark.parametrize("shards", [1, 3])
def test_mapped_files_go_straight_to_the_gpu(tmp_path, small, shards):
    bindings = FakeBindings()
    plan = check_loaded(write_folder(tmp_path, torch.bfloat16, shards=shards), bindings)
    assert bindings.calls.count("cuMemHostRegister") > 3
    assert bindings.calls.count("cuMemHostRegister") == bindings.calls.count("cuMemHostUnregister")
    copied = sum(nbytes for kind, *_, nbytes in bindings.copies if kind == "in")
    assert copied >= sum(w.nbytes for w in plan.weights)


def test_rows_of_blocks_that_divide_nothing_get_zeros_behind_them(tmp_path, small):
    """64 and 128 columns in blocks of 48: what a mapped file holds cannot be copied as it lies there."""
    stored = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}
    config = {**CONFIG, "quantization_config": stored}
    made = DummyCheckpoint(config, None, 0)
    make_plan(made, kernels=False)
    tensors = {}
    for name, info in made.tensors.items():
        array = torch.from_numpy(made.read(name))
        kind = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}.get(info.dtype)
        tensors[name] = array if kind is None else array.view(kind)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    plan = check_loaded(open_checkpoint(tmp_path), FakeBindings())
    assert {w.param.padding for w in plan.weights} == {(), (0, 32), (0, 16)}


def test_mapped_files_go_straight_in_windows_of_the_usual_size(tmp_path):
    bindings = FakeBindings()
    check_loaded(write_folder(tmp_path, torch.bfloat16), bindings)
    assert 1 <= bindings.calls.count("cuMemHostRegister") <= 2


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_stays_pinned_than_allowed(tmp_path, small, monkeypatch, threads):
    monkeypatch.setattr(cuda_pages, "PINNED", threads * 2 * cuda_pages.WINDOW)
    monkeypatch.setattr(cuda_weights, "MOST_THREADS", threads)
    monkeypatch.setattr(cuda_weights, "_cores", lambda: threads)
    bindings = FakeBindings()
    register, seen = bindings.cuMemHostRegister, []

    def watched(*args):
        made = register(*args)
        seen.append(sum(bindings.registered.values()))
        return made

    bindings.refuse["cuMemHostRegister"] = watched
    check_loaded(write_folder(tmp_path, torch.bfloat16), bindings)
    assert len(seen) > 3 * threads
    assert cuda_pages.WINDOW < max(seen) <= cuda_pages.PINNED


def test_pages_are_mapped_before_there_is_a_device(tmp_path, small, monkeypatch):
    mapped, everything = [], threading.Event()
    checkpoint = write_folder(tmp_path, torch.bfloat16)
    size = (tmp_path / "model.safetensors").stat().st_size

    def watched(start, nbytes, stop=lambda: False):
        map_pages(start, nbytes, stop)
        mapped.append(nbytes)
        if sum(mapped) > 0.9 * size:
            everything.set()

    map_pages = cuda_pages.map_pages
    monkeypatch.setattr(cuda_weights, "map_pages", watched)
    upload = cuda_weights.Upload(make_plan(checkpoint, kernels=False), checkpoint, lambda done, total: None)
    assert everything.wait(600)
    upload.close()


@pytest.mark.parametrize("answer", [0, -1])
def test_pages_can_be_read_once_they_are_mapped_whether_the_system_helps_or_not(monkeypatch, answer):
    asked = []
    monkeypatch.setattr(cuda_pages, "_madvise", lambda *args: asked.append(args) or answer)
    monkeypatch.setattr(cuda_pages, "MAPPED", 3 * 4096)
    memory = np.zeros(12 * 4096, np.uint8)
    start = -(-memory.ctypes.data // 4096) * 4096
    cuda_pages.map_pages(start, 10 * 4096)
    assert [(a.value - start, n.value) for a, n, _ in asked] == [
        (0, 12288), (12288, 12288), (24576, 12288), (36864, 4096)
    ]  # fmt: skip
    cuda_pages.map_pages(start, 10 * 4096, stop=lambda: len(asked) == 5)
    assert len(asked) == 5


def test_files_that_cannot_be_pinned_pass_through_buffers(tmp_path, small):
    check_loaded(write_folder(tmp_path, torch.bfloat16), FakeBindings(registers_files=False))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_other_dtypes_are_converted(tmp_path, small, stored, wanted):
    check_loaded(write_folder(tmp_path, stored), FakeBindings(), weight_dtype=wanted)


def test_dummy_weights_are_made_as_they_are_read(small):
    check_loaded(dummy(), FakeBindings())


def test_an_error_in_a_thread_reaches_the_caller_and_leaves_nothing(tmp_path, small):
    checkpoint = write_folder(tmp_path, torch.float32)
    read = checkpoint.read

    def broken(name, rows=None):
        if "down_proj" in name:
            raise OSError("the disk is gone")
        return read(name, rows)

    checkpoint.read = broken
    bindings = FakeBindings()
    with pytest.raises(OSError, match="the disk is gone"):
        CudaExecutable(make_plan(checkpoint), checkpoint, driver=Driver(bindings))
    bindings.check_released()


def test_a_refused_copy_reaches_the_caller_and_leaves_nothing(tmp_path, small):
    bindings = FakeBindings()
    checkpoint = write_folder(tmp_path, torch.bfloat16)
    plan = make_plan(checkpoint)
    copy = bindings.cuMemcpyHtoDAsync

    def refuse(target, source, nbytes, stream):
        if bindings.registered:
            return (real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        return copy(target, source, nbytes, stream)

    bindings.refuse["cuMemcpyHtoDAsync"] = refuse
    with pytest.raises(DriverError, match="cuMemcpyHtoDAsync failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        CudaExecutable(plan, checkpoint, driver=Driver(bindings))
    bindings.check_released()


def test_a_layout_of_another_version_is_refused():
    plan = make_plan()
    weight = next(w for w in plan.weights if w.param.pieces)
    odd = replace(weight, param=replace(weight.param, layout="packed"))
    plan = replace(plan, weights=tuple(odd if w is weight else w for w in plan.weights))
    bindings = FakeBindings()
    with pytest.raises(PlanError, match="layout 'packed', which this version cannot load"):
        CudaExecutable(plan, dummy(), driver=Driver(bindings))
    bindings.check_released()


def bits(dtype: str) -> np.ndarray:
    """Every bit pattern of a 16-bit dtype, or many of float32 with all kinds of NaN, infinity and ties."""
    if dtype != "float32":
        return np.arange(2**16, dtype=np.uint16)
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    high = np.arange(2**16, dtype=np.uint32) << 16
    return np.concatenate([random, high, high | 0x8000, high | 0x7FFF, high | 0x8001, high | 0xFFFF])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_conversion_rounds_as_pytorch_does(stored, wanted):
    raw = bits(stored)
    tensor = torch.from_numpy(raw.view(np.int32 if stored == "float32" else np.int16))
    expected = tensor.view(getattr(torch, stored)).to(getattr(torch, wanted))
    source = raw if stored == "bfloat16" else raw.view(stored)
    made = convert(source, stored, wanted)
    got = torch.from_numpy(made.view(np.int32 if wanted == "float32" else np.int16)).view(
        getattr(torch, wanted)
    )
    number = ~expected.isnan()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[number], expected[number])


def test_conversions_that_do_not_exist_are_refused():
    with pytest.raises(PlanError, match="stored as int32 and the plan wants bfloat16"):
        convert(np.zeros(3, np.int32), "int32", "bfloat16")
