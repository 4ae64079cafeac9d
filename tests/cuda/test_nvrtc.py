"""CUDA C++ on its way into a plan: what it compiles to, what is refused, what enters the key of its content."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings.nvrtc")

import small_programs
from small_programs import TARGET, emitted

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner import plan_cache
from makeready.graphs.planner.cuda import aot, nvrtc
from makeready.graphs.planner.cuda.table import resource_table
from makeready.kernels import registry
from makeready.kernels.attention.extend_cuda import candidate, extend_attention_prefill, schedules
from makeready.kernels.device import (
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
    Tensor,
)
from makeready.kernels.elementwise import silu

try:
    nvrtc.version()
except PlanError:
    pytest.skip("needs the NVRTC wheel", allow_module_level=True)

SCALE = """
#include "small.h"
extern "C" __device__ int launch_facts[3] = {64, SHARED, BLOCKS};
extern "C" __global__ void
scale(GRID_CONSTANT TensorMap x_map, /* rows, */ uint16_t* y, int* counter,  // of blocks, (all)
      int rows, float factor) {
  extern __shared__ unsigned char room[];
  asm volatile("prefetch.tensormap [%0];" ::"l"(&x_map) : "memory");
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  float kept[SPILLED + 1];
  for (int i = 0; i <= SPILLED; ++i) kept[i] = y[i];
  for (int i = threadIdx.x; i < rows; i += 64) y[i] = (uint16_t)(kept[counter[i] % (SPILLED + 1)] * factor);
}
"""
SMALL = """
typedef unsigned short uint16_t;
struct alignas(64) TensorMap { unsigned long long opaque[16]; };
#define GRID_CONSTANT const __grid_constant__
"""
CONSTANTS = {"SHARED": 2048, "BLOCKS": 1, "PDL": 1, "SPILLED": 0}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources in place of kernels/csrc/."""
    (tmp_path / "small.h").write_text(SMALL)
    (tmp_path / "small.cu").write_text(SCALE)
    monkeypatch.setattr(nvrtc, "FOLDER", tmp_path)
    return tmp_path


def scale(call: OpCall, constants: dict[str, Any] | None = None, **changes: Any) -> list[Candidate]:
    """One candidate over ``silu``'s operands."""
    x = call.tensors["x"]
    launch = DeviceLaunch(
        function="csrc/small.cu:scale",
        constants=CONSTANTS | (constants or {}),
        arguments={
            "x_map": Descriptor("x", x.shape, (x.row_stride, 1), (8, 64), swizzle=128),
            "y": Pointer("y"),
            "counter": Scratch(0, "int32"),
            "rows": Scalar(int(x.shape[0]), "int32"),
            "factor": Scalar(2.0, "float32"),
        },
        grid=(6, 1, 1),
        dependent=True,
    )
    return [Candidate("source", (replace(launch, **changes),), scratch=256, zeroed=256)]


def plan_with(monkeypatch: pytest.MonkeyPatch, cache: Path, make: Any = scale) -> Any:
    """The small programs with C++ for silu."""
    small_programs.register(monkeypatch)
    monkeypatch.setitem(registry._CUDA_KERNELS, "silu", [])
    registry.cuda_kernel(silu, "source")(make)
    return emitted(cache)


def test_a_plan_says_how_it_is_launched(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_with(monkeypatch, tmp_path / "cache")
    (node,) = made.programs["extend"].classes[1].candidates["extend-16x64"][0].nodes
    binary = made.binaries[node.binary]
    assert node.binary.startswith("scale-")
    assert (binary.function, binary.warps, binary.shared, binary.dependent) == ("scale", 2, 2048, True)
    assert (binary.null_pointers, binary.cluster, binary.spill_bytes) == (0, 1, 0)
    assert binary.registers > 0
    assert [a.kind for a in node.arguments] == ["map", "pointer", "scratch", "scalar", "scalar"]
    x = node.arguments[0]
    assert (x.operand, x.shape, x.strides, x.block) == ("x", (64, 256), (768, 1), (8, 64))
    assert (x.swizzle, x.element_type) == (
        3,
        9,
    )  # CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    others = [b for key, b in made.binaries.items() if key != node.binary]
    assert others
    assert {b.null_pointers for b in others} == {2}
    assert made.cubins[node.binary][:4] == b"\x7fELF"


def test_kernels_are_kept_by_content(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By source, header, macro, architecture and compiler; not by the numbers of a launch."""
    (launch,) = scale(_call())[0].launches
    kernel = aot.kernel_of(launch, _call(), 90)
    keys = {aot.content_key(kernel)}
    other_launch = replace(launch, grid=(99, 1, 1), arguments=launch.arguments | {"rows": Scalar(7, "int32")})
    assert aot.content_key(aot.kernel_of(other_launch, _call(), 90)) in keys
    keys.add(aot.content_key(replace(kernel, arch=100)))
    keys.add(aot.content_key(replace(kernel, constants=(*kernel.constants, ("MORE", 1)))))
    monkeypatch.setattr(nvrtc, "version", lambda: "14.0")
    keys.add(aot.content_key(kernel))
    (sources / "small.h").write_text(SMALL + "// more\n")
    keys.add(aot.content_key(kernel))
    (sources / "small.cu").write_text(SCALE + "// more\n")
    keys.add(aot.content_key(kernel))
    assert len(keys) == 6


def test_the_cache_serves_them(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan_with(monkeypatch, tmp_path / "cache")

    def refuse(*args: Any) -> Any:
        raise AssertionError("compiled twice")

    monkeypatch.setattr(nvrtc, "compile_source", refuse)
    again = plan_with(monkeypatch, tmp_path / "cache")
    assert again.binaries == first.binaries
    assert again.cubins == first.cubins


@pytest.mark.parametrize(
    ("constants", "changes", "message"),
    [
        ({"PDL": 0}, {}, "is dependent and never waits"),
        ({"BLOCKS": 4}, {}, "6 blocks along x, which is no multiple of its clusters of 4"),
        ({"SHARED": 240_000}, {}, r"needs 240000 bytes of shared memory, sm_90a has 232448"),
        ({"SPILLED": 500}, {}, r"spills: 20\d\d bytes of local memory a thread, 0 are allowed"),
        ({"PDL": "nonsense("}, {}, r"small.cu:scale \(.*\) for compute capability 90 does not compile"),
        ({"PDL": 0.5}, {}, "a constant of a CUDA C\\+\\+ kernel is an integer or a name, not 0.5"),
        ({}, {"function": "csrc/small.cu:scales"}, "small.cu defines no kernel scales"),
        ({}, {"function": "csrc/none.cu:scale"}, "the source of a kernel cannot be read"),
        ({}, {"arguments": {}}, "takes x_map, y, counter, rows, factor; .* wrong about counter, factor"),
    ],
)
def test_what_is_refused(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constants: Any, changes: Any, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_with(monkeypatch, tmp_path / "cache", lambda call: scale(call, constants, **changes))


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("rows", Scalar(1, "int64"), "rows is a scalar int32, the launch for silu passes Scalar int64"),
        ("rows", Pointer("x"), "rows is a scalar int32, .* passes Pointer bfloat16"),
        ("counter", Scalar(1, "int32"), "counter is a pointer, not Scalar"),
        ("counter", Pointer("y"), "counter is a pointer int32, .* passes Pointer bfloat16"),
        ("x_map", Pointer("x"), "x_map is a map, .* passes Pointer bfloat16"),
        ("y", Pointer("z"), "silu has no operand 'z' for y"),
        ("x_map", Descriptor("x", (64, 256), (256, 1), (8, 64)), "over x has no swizzle of None bytes"),
        ("x_map", Descriptor("x", (64, 256), (256, 1), (8, 128), swizzle=128), r"with rows of 256 bytes"),
        ("x_map", Descriptor("x", (64, 256), (257, 1), (8, 64), swizzle=128), "no multiples of 16 bytes"),
    ],
)
def test_arguments_are_held_to_the_source(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, argument: Any, message: str
) -> None:
    def wrong(call: OpCall) -> list[Candidate]:
        (launch,) = scale(call)[0].launches
        return scale(call, arguments=launch.arguments | {name: argument})

    with pytest.raises(PlanError, match=message):
        plan_with(monkeypatch, tmp_path / "cache", wrong)


def test_products_that_wait_for_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product's result is read before it is waited for: the assembler then waits by itself, everywhere."""
    for path in (*nvrtc.FOLDER.glob("*.h"), nvrtc.FOLDER / "prefill.cu"):
        text = path.read_text()
        (tmp_path / path.name).write_text(text.replace("      wgmma_wait<1>();\n", ""))
    (launch,) = candidate(_attention()).launches
    monkeypatch.setattr(nvrtc, "FOLDER", tmp_path)
    with pytest.raises(PlanError, match=r"makes matrix products wait for each other: .*serializ"):
        aot.compile_launch(launch, _attention())


def test_a_machine_without_the_wheel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise nvrtc.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(nvrtc.importlib.metadata, "version", missing)
    nvrtc.version.cache_clear()
    try:
        with pytest.raises(PlanError, match=r"pip install 'makeready\[cuda-compile\]'"):
            nvrtc.source_key("csrc/prefill.cu:attention_prefill")
    finally:
        nvrtc.version.cache_clear()


def _call() -> OpCall:
    tensors = {name: Tensor((64, 256), "bfloat16", 256, 256) for name in ("x", "y")}
    return OpCall("silu", tensors, {}, {"C": 256}, 64, 64)


def _attention(
    group: int = 4,
    page: int = 64,
    window: int = 0,
    dtype: str = "bfloat16",
    size: int = 128,
    cached: str = "",
) -> OpCall:
    heads, rows, tokens = 2 * group, 16, 1024
    cache = Tensor(("P", page, 2, size), cached or dtype, page * 2 * size, 256)
    each = Tensor((rows,), "int32", 1, 256)
    tensors = {
        "q": Tensor((tokens, heads * size), dtype, heads * size + 512, 256),
        "k_cache": cache,
        "v_cache": cache,
        "page_table": Tensor((rows, 100), "int32", 100, 256),
        **dict.fromkeys(("query_start", "query_len", "context_len"), each),
        "y": Tensor((tokens, heads * size), dtype, heads * size, 256),
    }
    attrs = {"heads": heads, "kv_heads": 2, "head_dim": size, "scale": 0.1, "window": window}
    return OpCall("extend_attention", tensors, attrs, {}, rows, tokens, features=TARGET.features)


F8 = "float8_e4m3fn"


@pytest.mark.parametrize(
    ("group", "page", "window", "dtype", "size", "cached"),
    [
        (4, 64, 0, "bfloat16", 128, ""),
        pytest.param(1, 64, 0, "float16", 128, "", marks=pytest.mark.slow),
        pytest.param(7, 128, 0, "bfloat16", 128, "", marks=pytest.mark.slow),
        pytest.param(8, 64, 500, "bfloat16", 128, "", marks=pytest.mark.slow),
        pytest.param(16, 64, 0, "bfloat16", 128, F8, marks=pytest.mark.slow),
        pytest.param(5, 64, 500, "float16", 128, F8, marks=pytest.mark.slow),
        pytest.param(4, 64, 0, "bfloat16", 64, "", marks=pytest.mark.slow),
        (7, 64, 500, "bfloat16", 64, ""),
        pytest.param(6, 64, 500, "bfloat16", 64, F8, marks=pytest.mark.slow),
        pytest.param(4, 64, 0, "bfloat16", 256, "", marks=pytest.mark.slow),
        (3, 128, 500, "float16", 256, ""),
        (2, 64, 500, "bfloat16", 256, F8),
    ],
)
def test_prefill_attention(group: int, page: int, window: int, dtype: str, size: int, cached: str) -> None:
    """A few bytes are spilled at 64, else none; warps have the registers that they need, plans the wait."""
    call = _attention(group, page, window, dtype, size, cached)
    (planned,) = extend_attention_prefill(call)
    found = [candidate(call, way) for way in schedules(call)]
    assert planned in found
    assert len({way.name for way in found}) == len(found)
    for way in found if group == 4 else [planned]:
        (launch,) = way.launches
        made = aot.compile_launch(launch, call)
        assert made.spill_bytes <= (16 if size == 64 else 0) <= launch.local_bytes
        assert made.warps * made.registers == (12 * 168 if size > 64 else 16 * 128)
        assert made.shared <= call.shared_bytes
        assert made.waits
        kind = "f16" if dtype == "float16" or cached else "bf16"
        keys = 64 if size == 256 else 128
        assert f"wgmma.mma_async.sync.aligned.m64n{keys}k16.f32.{kind}.{kind}" in made.ptx
        assert f"wgmma.mma_async.sync.aligned.m64n{size}k16.f32.{kind}.{kind}" in made.ptx
        assert "cp.async.bulk.tensor.4d" in made.ptx
        assert (way.scratch, way.zeroed) == (256, 256)


def test_waits_of_plans_never_give_up() -> None:
    """They loop until the barrier says so; debugging counts polls."""
    call = _attention()
    for give_up in (0, 123_456):
        (launch,) = candidate(call, give_up=give_up).launches
        assert ("123456" in aot.compile_launch(launch, call).ptx) == bool(give_up)
    (planned,) = extend_attention_prefill(call)[0].launches
    assert "GIVE_UP" not in planned.constants


def test_the_same_bytes_in_another_process_and_folder(tmp_path: Path) -> None:
    code = (
        "import hashlib, shutil, sys, test_nvrtc as t\n"
        "from pathlib import Path\n"
        "here = Path(sys.argv[1])\n"
        "shutil.copytree(t.nvrtc.FOLDER, here)\n"
        "t.nvrtc.FOLDER = here\n"
        "print(t.fingerprint())"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
    }
    text = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "elsewhere")],
        capture_output=True, text=True, check=True, env=environment, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert text.strip() == fingerprint()


def fingerprint() -> str:
    """Machine code and key of a kernel, as a digest."""
    call = _attention()
    kernel = aot.kernel_of(candidate(call).launches[0], call, 90)
    made = aot.compile_kernel(kernel)
    total = nvrtc.hashlib.sha256(made.cubin + made.ptx.encode() + aot.content_key(kernel).encode())
    return total.hexdigest()


def test_the_resource_table_counts_its_threads(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_with(monkeypatch, tmp_path / "cache")
    plan: Any = type("Some", (), {"loading": None, "dropped": ()})()
    plan.binaries, plan.cubins, plan.programs = made.binaries, made.cubins, made.programs
    (line,) = (line for line in resource_table(plan).splitlines() if line.startswith("scale-"))
    assert line.split()[1] == "64"


def test_cached_plans_are_of_these_sources_and_this_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (plan_cache.SOURCES / "graphs" / "planner" / "plan_cache.py").is_file()
    assert (plan_cache.SOURCES / "kernels" / "csrc").is_dir()
    (tmp_path / "kernels" / "csrc").mkdir(parents=True)
    monkeypatch.setattr(plan_cache, "SOURCES", tmp_path)
    found = set()
    for name in ("a.cu", "b.h", "ignored.txt"):
        (tmp_path / "kernels" / "csrc" / name).write_text("1")
        found.add(plan_cache.code_fingerprint.__wrapped__())
    (tmp_path / "kernels" / "csrc" / "b.h").write_text("2")
    found.add(plan_cache.code_fingerprint.__wrapped__())
    assert len(found) == 3
    assert nvrtc.version() in plan_cache._compilers()
