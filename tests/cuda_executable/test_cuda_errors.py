"""Machines and plans that do not fit: a sentence with the numbers, and nothing left behind."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from fake_driver import FakeBindings, real
from plans import CONFIG, dummy, tiny

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.cuda.driver import Driver, DriverError
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan.plan import Plan, PlanError


def refused(match: str, plan: Plan | None = None, bindings: FakeBindings | None = None, **options) -> None:
    bindings = bindings or FakeBindings()
    with pytest.raises((PlanError, DriverError), match=match):
        CudaExecutable(plan or tiny(), dummy(), driver=Driver(bindings), **options)
    bindings.check_released()


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("sm_90a", (8, 9), False),
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_80", (9, 0), False),
        ("sm_89", (8, 6), False),
        ("sm_100a", (10, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_120a", (12, 0), True),
    ],
)
def test_plans_run_on_the_architecture_they_are_for(target, capability, runs):
    bindings = FakeBindings(capability=capability)
    plan = replace(tiny(), target=target)
    if runs:
        CudaExecutable(plan, dummy(), driver=Driver(bindings)).close()
        bindings.check_released()
    else:
        found = f"{capability[0]}.{capability[1]}"
        refused(rf"for target {target} \(compute capability .*Fake GPU with {found}", plan, bindings)


def test_an_old_driver_is_refused():
    refused(
        r"driver supports CUDA 12.2, a plan for sm_90a needs 12.3; update",
        bindings=FakeBindings(version=12020),
    )
    refused(
        r"driver supports CUDA 12.4, a plan for sm_100a needs 12.8",
        replace(tiny(), target="sm_100a"),
        FakeBindings(version=12040, capability=(10, 0)),
    )


def test_no_gpu_and_no_driver_are_refused():
    refused("GPU 2 was asked for, the driver sees 1", ordinal=2)
    refused("GPU 0 was asked for, the driver sees 0", bindings=FakeBindings(devices=0))
    bindings = FakeBindings(refuse={"cuInit": real.CUresult.CUDA_ERROR_NO_DEVICE})
    refused("no NVIDIA driver can be used here .*cuInit failed with CUDA_ERROR_NO_DEVICE", bindings=bindings)

    def missing(flags):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    refused(
        "no NVIDIA driver can be used here .*Failed to dlopen",
        bindings=FakeBindings(refuse={"cuInit": missing}),
    )


def test_too_little_memory_is_refused_with_the_numbers():
    refused(
        r"the GPU has 0.10 GiB free, and 0.2\d GiB are needed: 0.00 for weights and buffers, 0.2\d for the driver",
        bindings=FakeBindings(memory=2**30 // 10),
    )
    page = tiny().kv.page_bytes
    two = f"two KV pages {2 * page / 1024:.2f} KiB"
    refused(rf"\({page} bytes\) is too little: {two}; raise kv.memory_gib", kv_bytes=page)


def test_pages_come_from_what_is_asked_for_or_what_is_there():
    plan = tiny()
    from makeready.graphs.executable.cuda import memory as cuda_memory

    reserved = (
        cuda_memory.RESERVED + cuda_memory.RESERVED_PER_GRAPH * len(plan.buckets) + 256 * len(plan.kv.parts)
    )
    # One row's full context is 4 pages and 4 rows are the most: what is free goes beyond that.
    fifty = reserved + plan.memory.fixed + 50 * plan.kv.page_bytes + 100
    for kv_bytes, free, pages in ((None, fifty, 50), (7 * plan.kv.page_bytes + 1, fifty, 7)):
        bindings, said = FakeBindings(memory=free), list[str]()
        executable = CudaExecutable(
            plan, dummy(), driver=Driver(bindings), kv_bytes=kv_bytes, report=said.append
        )
        assert executable.pages == pages
        assert sum("KV cache" in line and f"{pages - 1} pages of 16 tokens" in line for line in said) == 1
        executable.close()
        bindings.check_released()
    free = reserved + plan.memory.fixed + 5 * plan.kv.page_bytes + 3
    assert cuda_memory.kv_memory(plan, free, None).pages == 5
    with pytest.raises(PlanError, match="are needed"):
        cuda_memory.kv_memory(plan, free, 6 * plan.kv.page_bytes)


def test_the_arithmetic_of_the_cache_is_told():
    plan = replace(tiny(), memory=replace(tiny().memory, weights=15 * 2**30))
    from makeready.graphs.executable.cuda import memory as cuda_memory

    memory = cuda_memory.kv_memory(plan, 140 * 2**30, None)
    left = 140 * 2**30 - plan.memory.fixed - memory.reserve
    assert memory.pages == left // plan.kv.page_bytes
    said = memory.sentence(plan)
    assert said.startswith("KV cache: 140.00 GiB free - 15.00 for weights and buffers - 0.2")
    assert f"reserve for the driver = {left / 2**30:.2f} GiB: {memory.pages - 1:,} pages" in said
    asked = cuda_memory.kv_memory(plan, 140 * 2**30, 2**30).sentence(plan)
    assert "of which kv.memory_gib takes 1.00:" in asked


@pytest.mark.parametrize(
    ("chosen", "gpu", "said"),
    [
        ("h200", "NVIDIA H200", None),
        ("h200", "NVIDIA H100 80GB HBM3", r"chosen for device h200 and runs on NVIDIA H100 .*device=h100$"),
        ("h100", "NVIDIA H200", "device=h200$"),
        ("h200", "NVIDIA X9000", "not known"),
        ("one of a later version", "NVIDIA H200", "device=h200$"),
        ("", "NVIDIA H200", None),  # a plan of before devices had names
    ],
)
def test_a_plan_that_was_chosen_for_another_device_runs_and_says_so_once(chosen, gpu, said):
    bindings, lines = FakeBindings(name=gpu.encode()), list[str]()
    executable = CudaExecutable(
        replace(tiny(), device=chosen), dummy(), driver=Driver(bindings), report=lines.append
    )
    executable.close()
    found = [line for line in lines if "chosen for" in line]
    assert len(found) == (said is not None)
    assert all(re.search(str(said), line) for line in found)


def test_memory_that_is_free_but_not_given_is_refused():
    status = (real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
    bindings = FakeBindings(refuse={"cuMemAlloc": lambda nbytes: status})
    refused(
        "no memory for the plan's 0.0. GiB: cuMemAlloc of .* failed with CUDA_ERROR_OUT_OF_MEMORY",
        bindings=bindings,
    )


def test_machine_code_that_is_missing_or_does_not_load_is_refused():
    plan = tiny()
    key = next(iter(plan.binaries))
    name = plan.binaries[key].function
    rest = {k: v for k, v in plan.cubins.items() if k != key}
    refused(f"machine code of kernel {name} .* is missing", replace(plan, cubins=rest))
    refused(
        f"kernel {name} of the plan for sm_90a does not load on Fake GPU: cuLibraryLoadData failed with "
        "CUDA_ERROR_INVALID_IMAGE",
        replace(plan, cubins={**plan.cubins, key: b"not machine code"}),
    )
    other = replace(plan.binaries[key], function="another")
    refused(
        "kernel another .* does not load .* CUDA_ERROR_NOT_FOUND",
        replace(plan, binaries={**plan.binaries, key: other}),
    )


def test_a_node_that_the_driver_refuses_is_an_error():
    bindings = FakeBindings(refuse={"cuGraphAddNode": real.CUresult.CUDA_ERROR_INVALID_VALUE})
    refused("cuGraphAddNode failed with CUDA_ERROR_INVALID_VALUE", bindings=bindings)


def test_another_checkpoints_plan_is_refused_before_the_gpu_is_touched():
    bindings = FakeBindings()
    other = DummyCheckpoint({**CONFIG, "rms_norm_eps": 1e-6}, None, 0)
    with pytest.raises(PlanError, match="config has rms_norm_eps"):
        CudaExecutable(tiny(), other, driver=Driver(bindings))
    assert not bindings.calls


def test_load_chooses_by_target(monkeypatch):
    bindings = FakeBindings()
    monkeypatch.setattr("makeready.graphs.executable.cuda.driver.load_bindings", lambda: bindings)
    executable = load_executable(tiny(), dummy(), kv_bytes=4 * tiny().kv.page_bytes)
    assert isinstance(executable, CudaExecutable)
    assert executable.pages == 4
    executable.close()
    with pytest.raises(PlanError, match="target mips, this backend runs sm_80, sm_90a and the like"):
        load_executable(replace(tiny(), target="mips"), dummy())


def test_bindings_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(DriverError, match="install cuda-bindings"):
        Driver()


def test_the_runtime_imports_neither_torch_nor_triton():
    code = (
        "import sys; import makeready.graphs.executable.cuda.executable, makeready.graphs.executable.load, "
        "makeready.graphs.plan.artifact, makeready.graphs.checkpoint.huggingface; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'triton', 'transformers'}))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"
