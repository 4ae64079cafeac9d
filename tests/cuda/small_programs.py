"""A program of two phases over small kernels, and implementations for its ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from makeready.graphs.plan.program import Buffer, Launch, LoweredProgram
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import Target, find_target
from makeready.graphs.planner.cuda.emit import Emitted, emit
from makeready.kernels import registry
from makeready.kernels.device import (
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
)
from makeready.kernels.elementwise import multiply, silu
from makeready.kernels.spec import TensorSpec

TARGET = find_target("sm_90a")
BUCKETS = (Bucket("decode", 1, 1), Bucket("decode", 16, 16), Bucket("extend", 16, 64))
WIDTH = 256


def register(monkeypatch: Any) -> None:
    """Make the implementations here the only ones."""
    monkeypatch.setattr(registry, "_CUDA_KERNELS", {})
    registry.cuda_kernel(silu, "rows")(scale_rows)
    registry.cuda_kernel(silu, "tiles", features=("tma",))(copy_tiles)
    registry.cuda_kernel(multiply, "scratch")(count_blocks)


def scale_rows(call: OpCall, **changes: Any) -> list[Candidate]:
    """One candidate, dependent where the target allows it."""
    x, dependent = call.tensors["x"], "pdl" in call.features
    launch = DeviceLaunch(
        function="small_triton:scale_rows",
        constants={"STRIDE": x.row_stride, "C": call.dims["C"], "PDL": dependent},
        arguments={"x": Pointer("x"), "y": Pointer("y"), "factor": Scalar(2.0, "float32")},
        grid=(int(x.shape[0]), 1, 1),
        dependent=dependent,
    )
    return [Candidate("one", (replace(launch, **changes),))]


def copy_tiles(call: OpCall) -> list[Candidate]:
    """Two candidates through tensor maps."""
    return [Candidate(f"{c}", (_copy(call, c),)) for c in (64, 128)]


def _copy(call: OpCall, columns: int) -> DeviceLaunch:
    maps = {
        name: Descriptor(name, call.tensors[name].shape, (call.tensors[name].row_stride, 1), (16, columns))
        for name in ("x", "y")
    }
    return DeviceLaunch(
        function="small_triton:copy_tiles",
        constants={"ROWS": 16, "COLUMNS": columns},
        arguments=maps,
        grid=(-(-call.tokens // 16), WIDTH // columns, 1),
    )


def count_blocks(call: OpCall) -> list[Candidate]:
    """One candidate with counters and other scratch, whose sizes depend on the bucket."""
    counters = 4 * call.rows
    launch = DeviceLaunch(
        function="small_triton:count_blocks",
        constants={"C": 64},
        arguments={
            "x": Pointer("x"),
            "y": Pointer("z"),
            "counter": Scratch(0, "int32"),
            "partial": Scratch(256, "float32"),
        },
        grid=(2, 1, 1),
    )
    return [Candidate("one", (launch,), scratch=256 + 1024 * call.rows, zeroed=counters)]


def buffer(rows: str, columns: int, offset: int, row_stride: int | None = None) -> Buffer:
    """A bf16 arena buffer."""
    return Buffer(TensorSpec((rows, columns), "bfloat16"), offset, row_stride, 0, 9)


def program(phase: str, ops: Sequence[str] = ("silu", "silu", "multiply")) -> LoweredProgram:
    """``b = silu(a); c = silu(columns of wide); d = multiply(b, c)``, each twice."""
    rows = "R" if phase == "decode" else "T"
    buffers = {name: buffer(rows, WIDTH, 1 << 20) for name in "abcd"}
    buffers["view"] = buffer(rows, WIDTH, (1 << 21) + 16, row_stride=3 * WIDTH)
    calls = {
        "a": Launch("silu", "reference", {"x": "a"}, {"y": "b"}, {}),
        "view": Launch("silu", "reference", {"x": "view"}, {"y": "c"}, {}),
        "multiply": Launch("multiply", "reference", {"x": "b", "y": "c"}, {"z": "d"}, {}),
    }
    return LoweredProgram(phase, (*calls.values(), *calls.values()), buffers)


def emitted(cache: Path, target: Target = TARGET, keep: int = 1, **changes: Any) -> Emitted:
    """The two programs' kernels."""
    programs: Mapping[str, LoweredProgram] = {phase: program(phase) for phase in ("decode", "extend")}
    specs: dict[str, Mapping[str, TensorSpec]] = {phase: {} for phase in programs}
    return emit(programs, specs, BUCKETS, target, context=1024, keep=keep, cache=cache, **changes)
