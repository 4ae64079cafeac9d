"""Launches of CUDA C++ kernels on the CPU, as implementations state them.

The sources of kernels/csrc/ are compiled by g++ with emulator.h in place of the GPU's instructions. Grid, tensor
maps and the order and types of parameters are those of the :class:`DeviceLaunch`, so that these are tested, too.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch

from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.contract import CONTRACTS
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
from makeready.kernels.size import value
from makeready.kernels.spec import TensorSpec

HERE = Path(__file__).parent
_C_TYPES = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}
_ERROR = ctypes.c_char_p

_COMPILER = ("g++", "-fPIC", "-Og", "-std=c++20", "-fno-strict-aliasing", "-w")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels are emulated with g++")


class Emulator:
    """Kernels that are compiled so far, in a folder of their own.

    Args:
        folder: for shared libraries.
        sources: where the kernels' sources are.
    """

    def __init__(self, folder: Path, sources: Path = nvrtc.FOLDER) -> None:
        self._folder, self._sources = folder, sources
        self._made: dict[object, ctypes.CDLL] = {}

    def take(self, other: Emulator, *, but: str) -> None:
        """Kernels that ``other`` has compiled of files other than ``but``."""
        self._made |= {key: made for key, made in other._made.items() if f"/{but}:" not in str(key)}

    def run(
        self,
        candidate: Candidate,
        call: OpCall,
        tensors: Mapping[str, torch.Tensor],
        *,
        seed: int = 0,
        grid: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """``tensors`` and the results of ``candidate``, which were NaN before; its counters must be zero again.

        Args:
            seed: of the order in which things happen.
            grid: blocks in place of the candidate's.

        Raises:
            RuntimeError: the emulator met what the GPU refuses, or a deadlock.
        """
        full = dict(tensors)
        for name, tensor in call.tensors.items():
            if name not in full:
                full[name] = torch.full(
                    tuple(map(int, tensor.shape)), math.nan, dtype=getattr(torch, tensor.dtype)
                )
        scratch = torch.full((candidate.scratch,), 0xFF, dtype=torch.uint8)
        scratch[: candidate.zeroed] = 0
        for launch in candidate.launches:
            library = self._library(launch)
            held = [
                _parameter(library, launch.arguments[p.name], full, scratch)
                for p in nvrtc.parameters(launch.function)
            ]
            table = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h in held))
            _check(library.emulate(table, grid or launch.grid[0], ctypes.c_uint(seed)))
        left = int(scratch[: candidate.zeroed].count_nonzero())
        assert left == 0, f"{left} bytes of the counters are not zero after the call"
        return full

    def _library(self, launch: DeviceLaunch) -> ctypes.CDLL:
        key = (launch.function, tuple(sorted(launch.constants.items())))
        if key not in self._made:
            file, _, name = launch.function.rpartition("/")[2].partition(":")
            out = self._folder / f"{len(self._made)}.so"
            defines = [f"-D{k}={int(v)}" for k, v in launch.constants.items()]  # type: ignore[arg-type]
            headers = ["-include", str(_standard_headers())]
            options = ["-DEMULATED", "-shared", f'-DSOURCE="{file}"', f"-DKERNEL={name}", *defines]
            made = subprocess.run(
                [
                    *_COMPILER,
                    *headers,
                    *options,
                    f"-I{self._sources}",
                    f"-I{HERE}",
                    HERE / "library.cpp",
                    _runtime(fp16=bool(launch.constants.get("FP16"))),
                    "-o",
                    out,
                ],
                capture_output=True,
                text=True,
            )
            assert made.returncode == 0, made.stderr[-3000:]
            library = ctypes.CDLL(str(out))
            library.emulate.restype = library.encode_map.restype = _ERROR
            self._made[key] = library
        return self._made[key]


@cache
def _standard_headers() -> Path:
    """A header with those of the library that emulator.h includes, compiled: a third of each kernel's time."""
    folder = Path(tempfile.mkdtemp(prefix="emulator-"))
    atexit.register(shutil.rmtree, folder)
    header = folder / "standard.h"
    lines = (HERE / "emulator.h").read_text().splitlines()
    header.write_text("\n".join(line for line in lines if line.startswith("#include <")) + "\n")
    subprocess.run([*_COMPILER, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return header


@cache
def _runtime(*, fp16: bool) -> Path:
    """What all kernels share, compiled: half of each one's time."""
    header = _standard_headers()
    out = header.parent / f"runtime{int(fp16)}.o"
    options = ["-DEMULATED", "-DRUNTIME", f"-DFP16={int(fp16)}", "-x", "c++", "-c"]
    source = [HERE / "emulator.h", "-include", header, "-o", out]
    subprocess.run([*_COMPILER, *options, *source], check=True)
    return out


def _check(said: bytes | None) -> None:
    if said is not None:
        raise RuntimeError(said.decode())


def _parameter(
    library: ctypes.CDLL,
    argument: Pointer | Scratch | Scalar | Descriptor,
    tensors: Mapping[str, torch.Tensor],
    scratch: torch.Tensor,
) -> ctypes._SimpleCData | ctypes.Array:  # type: ignore[type-arg]
    if isinstance(argument, Pointer):
        return ctypes.c_uint64(tensors[argument.operand].data_ptr())
    if isinstance(argument, Scratch):
        return ctypes.c_uint64(scratch.data_ptr() + argument.offset)
    if isinstance(argument, Scalar):
        return _C_TYPES[argument.dtype](argument.value)
    tensor, rank = tensors[argument.operand], len(argument.shape)
    shape = [value(d, {"P": tensor.shape[0]}) for d in argument.shape]
    size = tensor.element_size()
    out = ctypes.create_string_buffer(128)
    _check(
        library.encode_map(
            out,
            ctypes.c_void_p(tensor.data_ptr()),
            size,
            rank,
            (ctypes.c_uint64 * rank)(*reversed(shape)),
            (ctypes.c_uint64 * rank)(*(s * size for s in reversed(argument.strides[:-1]))),
            (ctypes.c_uint32 * rank)(*reversed(argument.block)),
            int(argument.swizzle == 128),
        )
    )
    return out


def op_call(
    name: str, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, object], **options: object
) -> OpCall:
    """The call of contract ``name`` on CPU tensors; the axis P stays a symbol, as in a plan."""
    contract = CONTRACTS[name]
    attrs = {**contract.attrs, **attrs}
    specs = {k: TensorSpec(tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in tensors.items()}
    dims = contract.dims(specs, attrs)
    made = {}
    for operand in contract.inputs:
        if operand.name not in tensors:
            continue
        tensor = tensors[operand.name]
        shape = ("P", *tensor.shape[1:]) if operand.axes[:1] == ("P",) else tuple(tensor.shape)
        dtype = specs[operand.name].dtype
        made[operand.name] = Tensor(shape, dtype, tensor.stride(0), math.gcd(tensor.data_ptr(), 256))
    for key, spec in contract.infer(specs, attrs).items():
        made[key] = Tensor(spec.shape, spec.dtype, math.prod(map(int, spec.shape[1:])), 256)
    features = frozenset(("tma", "wgmma", "pdl", "fp8"))
    rows = dims.get("R", dims.get("T", 1))
    return OpCall(name, made, attrs, dims, rows, dims.get("T", rows), features=features, **options)  # type: ignore[arg-type]
