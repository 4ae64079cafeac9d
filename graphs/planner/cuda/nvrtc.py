"""CUDA C++ of kernels/csrc/ to machine code by NVRTC, with no GPU, toolkit or host compiler.

A kernel is an ``extern "C"`` function of one ``.cu`` file, named ``csrc/file.cu:function``. Its parameters are
tensor maps by value, addresses and numbers; constants are macros. The file says how it is launched in a variable::

    extern "C" __device__ int launch_facts[3] = {threads, bytes of dynamic shared memory, blocks of a cluster};

which is read out of the cubin, so that the numbers stand in one place. The assembler's log says what registers
and local memory a thread has, and whether it made matrix products wait for each other.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from makeready.graphs.plan.plan import PlanError
from makeready.kernels import device

FOLDER = Path(str(device.__file__)).parent / "csrc"

# What a pointer of a C type may point at, and what a number is, by their names in kernels/spec.py.
_POINTERS: Mapping[str, frozenset[str]] = {
    "float": frozenset({"float32"}),
    "int": frozenset({"int32"}),
    "int64_t": frozenset({"int64"}),
    "int16_t": frozenset({"int16"}),
    "uint16_t": frozenset({"bfloat16", "float16"}),
    "uint8_t": frozenset({"float8_e4m3fn", "int8", "uint8"}),
}
_NUMBERS: Mapping[str, str] = {"int": "int32", "int64_t": "int64", "float": "float32"}

_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# Out of the compiler's own cache machine code comes without what the assembler says of registers.
_OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v", "--no-cache")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel.

    Attributes:
        kind: ``map``, ``pointer`` or ``scalar``.
        dtypes: of what is pointed at, or of the number; empty for maps.
    """

    name: str
    kind: str
    dtypes: frozenset[str]

    @property
    def text(self) -> str:
        """Kind and dtypes, which enter a kernel's signature."""
        return " ".join((self.kind, *sorted(self.dtypes)))


@dataclass(frozen=True)
class Machine:
    """Machine code and what the assembler and the source say about it; see :class:`~.aot.Compiled`."""

    cubin: bytes
    ptx: str
    threads: int
    shared: int
    cluster: int
    registers: int
    stack: int


def is_source(function: str) -> bool:
    """Whether a launch's function is CUDA C++."""
    return function.partition(":")[0].endswith(".cu")


def parameters(function: str) -> tuple[Parameter, ...]:
    """Parameters of ``csrc/file.cu:function`` in order.

    Raises:
        PlanError: there is no such kernel, or a parameter is of a type that launches cannot pass.
    """
    return _parameters(_path(function), function.rpartition(":")[2])


@cache
def _parameters(path: Path, entry: str) -> tuple[Parameter, ...]:
    source = _COMMENT.sub("", _read(path))
    match = re.search(rf"__global__[^;{{}}]*?\b{re.escape(entry)}\s*\(([^)]*)\)", source)
    if match is None:
        raise PlanError(f"{path.name} defines no kernel {entry}")
    return tuple(_parameter(" ".join(text.split()), path, entry) for text in match[1].split(","))


def _parameter(text: str, path: Path, entry: str) -> Parameter:
    match = re.fullmatch(r"(?:GRID_CONSTANT |const )?(\w+) ?(\*?) ?(\w+)", text)
    if match is not None:
        kind, star, name = match.groups()
        if star and kind in _POINTERS:
            return Parameter(name, "pointer", _POINTERS[kind])
        if not star and kind == "TensorMap":
            return Parameter(name, "map", frozenset())
        if not star and kind in _NUMBERS:
            return Parameter(name, "scalar", frozenset({_NUMBERS[kind]}))
    raise PlanError(f"{path.name}:{entry}: a launch cannot pass the parameter {text!r}")


def source_key(function: str) -> str:
    """SHA-256 over the file and all headers of the folder that it includes, the compiler and its options."""
    total = hashlib.sha256(f"NVRTC {version()} {' '.join(_OPTIONS)}".encode())
    for name, text in _texts(_path(function)).items():
        total.update(f"\n{name} {len(text)}\n{text}".encode())
    return total.hexdigest()


@cache
def version() -> str:
    """Of the NVRTC wheel, such as 13.0.88.

    Raises:
        PlanError: it is not installed.
    """
    try:
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        raise PlanError(
            "kernels in CUDA C++ are compiled by nvidia-cuda-nvrtc, which is not installed; "
            "pip install 'makeready[cuda-compile]'"
        ) from None


def compile_source(function: str, constants: Sequence[tuple[str, Any]], arch: int) -> Machine:
    """Machine code of ``csrc/file.cu:function`` with ``constants`` as macros; takes 0.3 to 1 seconds.

    Raises:
        PlanError: the compiler refuses it, or matrix products would wait for each other; the message says why.
    """
    path, entry = _path(function), function.rpartition(":")[2]
    texts = dict(_texts(path))
    options = [f"--gpu-architecture=sm_{arch}{'a' if arch >= 90 else ''}", *_OPTIONS]
    options += [f"-D{name}={_macro(value)}" for name, value in constants]
    cubin, ptx, log = _compile(texts.pop(path.name), path.name, texts, options)
    serialized = [line.strip() for line in log.splitlines() if "wgmma" in line and "serializ" in line]
    if serialized:
        raise PlanError(f"the assembler makes matrix products wait for each other: {serialized[0]}")
    used, stack = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes stack frame", log)
    if used is None or stack is None:
        raise PlanError(f"the assembler says nothing about registers: {log}")
    threads, shared, cluster = variable(cubin, "launch_facts", 3)
    if threads % 32 or not 32 <= threads <= 1024 or cluster < 1:
        raise PlanError(f"launch_facts are wrong: {threads} threads, clusters of {cluster}")
    found = re.search(rf"\.entry {re.escape(entry)}\(", ptx)
    if found is None:
        raise PlanError(f'there is no entry {entry}; is it extern "C"?')
    return Machine(cubin, ptx, threads, shared, cluster, int(used[1]), int(stack[1]))


def _macro(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, int | str):
        raise PlanError(f"a constant of a CUDA C++ kernel is an integer or a name, not {value!r}")
    return str(value)


def _compile(
    source: str, name: str, headers: Mapping[str, str], options: Sequence[str]
) -> tuple[bytes, str, str]:
    """Cubin, PTX and log."""
    from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

    def ask(answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if int(status):
            raise PlanError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
        return values[0] if values else None

    def text(size: Any, get: Any) -> bytes:
        buffer = bytes(ask(size(program)))
        ask(get(program, buffer))
        return buffer

    program = ask(
        nvrtc.nvrtcCreateProgram(
            source.encode(),
            name.encode(),
            len(headers),
            [header.encode() for header in headers.values()],
            [header.encode() for header in headers],
        )
    )
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        log = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode().strip()
        if int(status):
            raise PlanError(log)
        cubin = text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        ptx = text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0").decode()
        return cubin, ptx, log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def variable(cubin: bytes, name: str, count: int) -> tuple[int, ...]:
    """The first ``count`` ints of an initialized variable of a cubin, which is an ELF file.

    Raises:
        PlanError: there is no such variable.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, _ = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(number)]
    for _, kind, _, _, offset, length, link, *_ in sections:
        if kind != 2:  # symbols
            continue
        strings = sections[link][4]
        for at in range(offset, offset + length, 24):
            label, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", cubin, at)
            start = strings + label
            if cubin[start : cubin.index(b"\0", start)] == name.encode():
                return struct.unpack_from(f"<{count}i", cubin, sections[section][4] + value)
    raise PlanError(f"the machine code has no variable {name}")


def _path(function: str) -> Path:
    folder, _, name = function.partition(":")[0].rpartition("/")
    if folder != "csrc":
        raise PlanError(f"{function} is no kernel of kernels/csrc/")
    return FOLDER / name


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise PlanError(f"the source of a kernel cannot be read: {error}") from None


def _texts(path: Path) -> dict[str, str]:
    """The file and the headers of its folder that it includes, directly or not, by name."""
    found: dict[str, str] = {}
    left = [path.name]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = _read(path.parent / name)
            left += [n for n in _INCLUDE.findall(found[name]) if (path.parent / n).exists()]
    return found
