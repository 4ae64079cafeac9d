"""Kernels to machine code, with no GPU: Triton's with no cache of its own, CUDA C++ by nvrtc.py.

A :class:`Kernel` is all that the machine code depends on: function, constants, parameter types, which
parameters are known to be multiples of 16, options and architecture. Two launches with the same kernel
share one binary.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.planner.cuda import nvrtc
from makeready.kernels.device import Descriptor, DeviceLaunch, OpCall, Pointer, Scalar, Scratch

TRITON_TYPES: Mapping[str, str] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "int64": "i64",
    "int32": "i32",
    "uint32": "u32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
}

_CUOBJDUMP = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

_ALIGNED = 16  # the one divisor that Triton's analysis of addresses starts from


@dataclass(frozen=True)
class Kernel:
    """What machine code is a function of.

    Attributes:
        function: a ``@triton.jit`` function as ``module:name``, or CUDA C++ as ``csrc/file.cu:name``.
        constants: values of constexpr parameters; of macros.
        signature: Triton types of the other parameters, or what C++'s are, in the function's order.
        aligned: addresses and integers that are multiples of 16; of no matter to C++.
        num_warps, num_stages: Triton's options; 0 for C++, which says itself how it is launched.
        arch: compute capability times ten.
    """

    function: str
    constants: tuple[tuple[str, Any], ...]
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    dependent: bool
    arch: int

    @property
    def name(self) -> str:
        """The function's own name."""
        return self.function.rpartition(":")[2]


@dataclass(frozen=True)
class MapLayout:
    """How a tensor-map parameter was compiled: the box of a copy and numbers of the driver's enumerations."""

    block: tuple[int, ...]
    swizzle: int
    element_type: int
    promotion: int = 2  # 128 bytes


@dataclass(frozen=True)
class Compiled:
    """Machine code and what launching it takes.

    Attributes:
        function: the entry point.
        arguments: parameters that are passed, in order; ``null_pointers`` follow.
        warps: threads of a block over 32; Triton may have raised what was asked for.
        shared: bytes of dynamic shared memory.
        registers: of a thread.
        spill_bytes: of local memory a thread has.
        waits: whether it waits for the kernels before it (``griddepcontrol.wait``).
        maps: of parameters that are Triton's tensor maps; the launch says what C++'s are.
        ptx: what the machine code was assembled from; empty where it comes from the cache.
        null_pointers: how many end the parameters: Triton's scratch pointers, which our kernels do not use.
        cluster: blocks of a cluster along x, which the machine code holds.
    """

    cubin: bytes
    function: str
    arguments: tuple[str, ...]
    warps: int
    shared: int
    registers: int
    spill_bytes: int
    waits: bool
    maps: Mapping[str, MapLayout]
    ptx: str = ""
    null_pointers: int = 2
    cluster: int = 1


def compile_launch(launch: DeviceLaunch, call: OpCall, arch: int = 90) -> Compiled:
    """Compile the kernel of ``launch`` as the planner would."""
    return compile_kernel(kernel_of(launch, call, arch))


def kernel_of(launch: DeviceLaunch, call: OpCall, arch: int) -> Kernel:
    """The kernel that ``launch`` asks for.

    Raises:
        PlanError: its constants and arguments are not the function's parameters.
    """
    if nvrtc.is_source(launch.function):
        return _source_kernel(launch, call, arch)
    parameters = jit_function(launch.function).arg_names
    given = {**launch.constants, **launch.arguments}
    if set(parameters) != set(given) or len(given) < len(launch.constants) + len(launch.arguments):
        odd = sorted(set(parameters) ^ set(given)) or sorted(set(launch.constants) & set(launch.arguments))
        raise PlanError(
            f"{launch.function} takes {', '.join(parameters)}; the launch for {call.op} is wrong about "
            f"{', '.join(odd)}"
        )
    passed = [name for name in parameters if name in launch.arguments]
    return Kernel(
        function=launch.function,
        constants=tuple((name, launch.constants[name]) for name in parameters if name in launch.constants),
        signature=tuple((name, _type(launch, name, call)) for name in passed),
        aligned=tuple(name for name in passed if _is_aligned(launch, name, call)),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        dependent=launch.dependent,
        arch=arch,
    )


def _source_kernel(launch: DeviceLaunch, call: OpCall, arch: int) -> Kernel:
    """The same of CUDA C++, where constants are macros and arguments the parameters."""
    parameters = nvrtc.parameters(launch.function)
    names = [parameter.name for parameter in parameters]
    if set(names) != set(launch.arguments):
        odd = sorted(set(names) ^ set(launch.arguments))
        raise PlanError(
            f"{launch.function} takes {', '.join(names)}; the launch for {call.op} is wrong about {', '.join(odd)}"
        )
    for parameter in parameters:
        argument = launch.arguments[parameter.name]
        given = _kind(launch, parameter.name, call)
        if given not in parameter.dtypes and (given, parameter.kind) != ("map", "map"):
            raise PlanError(
                f"{launch.function}: {parameter.name} is a {parameter.text}, the launch for {call.op} passes "
                f"{type(argument).__name__} {given}"
            )
        if (parameter.kind == "scalar") != isinstance(argument, Scalar):
            raise PlanError(f"{launch.function}: {parameter.name} is a {parameter.kind}, not {argument}")
    return Kernel(
        function=launch.function,
        constants=tuple(sorted(launch.constants.items())),
        signature=tuple((parameter.name, parameter.text) for parameter in parameters),
        aligned=(),
        num_warps=0,
        num_stages=0,
        dependent=launch.dependent,
        arch=arch,
    )


def _kind(launch: DeviceLaunch, name: str, call: OpCall) -> str:
    """``map``, or the dtype of a number or of what is pointed at."""
    argument = launch.arguments[name]
    if isinstance(argument, Scalar | Scratch):
        return argument.dtype
    if argument.operand not in call.tensors:
        raise PlanError(f"{launch.function}: {call.op} has no operand {argument.operand!r} for {name}")
    return "map" if isinstance(argument, Descriptor) else call.tensors[argument.operand].dtype


def _type(launch: DeviceLaunch, name: str, call: OpCall) -> str:
    argument = launch.arguments[name]
    if isinstance(argument, Scalar):
        return TRITON_TYPES[argument.dtype]
    if isinstance(argument, Scratch):
        return "*" + TRITON_TYPES[argument.dtype]
    if argument.operand not in call.tensors:
        raise PlanError(f"{launch.function}: {call.op} has no operand {argument.operand!r} for {name}")
    element = TRITON_TYPES[call.tensors[argument.operand].dtype]
    if element == "fp8e4nv" and "fp8" not in call.features:
        element = "u8"  # Triton does not know them there; kernels that only move them see bytes
    if isinstance(argument, Descriptor):
        return f"tensordesc<{element}[{', '.join(map(str, argument.block))}]>"
    return "*" + element


def _is_aligned(launch: DeviceLaunch, name: str, call: OpCall) -> bool:
    argument = launch.arguments[name]
    if isinstance(argument, Pointer):
        return call.tensors[argument.operand].alignment % _ALIGNED == 0
    if isinstance(argument, Scalar):
        return argument.specialize and isinstance(argument.value, int) and argument.value % _ALIGNED == 0
    return isinstance(argument, Scratch) and argument.offset % _ALIGNED == 0


def jit_function(function: str) -> Any:
    """The ``@triton.jit`` function called ``module:name``.

    Raises:
        PlanError: Triton was told to interpret kernels, so that there is nothing to compile.
    """
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not isinstance(found, triton.JITFunction):
        raise PlanError(f"{function} cannot be compiled: unset TRITON_INTERPRET while making a plan")
    return found


def content_key(kernel: Kernel) -> str:
    """SHA-256 over the sources of the function and all it calls, the compiler's version, and ``kernel``.

    Raises:
        PlanError: CUDA C++ cannot be compiled here.
    """
    if nvrtc.is_source(kernel.function):
        return hashlib.sha256(f"{nvrtc.source_key(kernel.function)}\n{kernel!r}".encode()).hexdigest()
    parts = (jit_function(kernel.function).cache_key, triton.__version__, repr(kernel))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def compile_kernel(kernel: Kernel) -> Compiled:
    """Machine code of ``kernel``; takes 0.2 to 2 seconds.

    Raises:
        PlanError: Triton, NVRTC or their assemblers refuse; the message is theirs.
    """
    if nvrtc.is_source(kernel.function):
        return _compile_source(kernel)
    function = jit_function(kernel.function)
    position = {name: (i,) for i, name in enumerate(function.arg_names)}
    types = dict(kernel.signature)
    source = ASTSource(
        function,
        {name: types.get(name, "constexpr") for name in function.arg_names},
        {position[name]: value for name, value in kernel.constants},
        {position[name]: [["tt.divisibility", _ALIGNED]] for name in kernel.aligned},
    )
    options = {
        "num_warps": kernel.num_warps,
        "num_stages": kernel.num_stages,
        "launch_pdl": kernel.dependent,
    }
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True  # it would put source paths into the machine code
        try:
            made = triton.compile(source, target=GPUTarget("cuda", kernel.arch, 32), options=options)
        except Exception as error:  # Triton's errors have no common base
            raise PlanError(f"{_label(kernel)} does not compile: {_reasons(error)}") from error
        cubin, ptx, metadata = made.asm["cubin"], made.asm["ptx"], made.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise PlanError(f"{_label(kernel)} makes descriptors on the device; pass it Descriptors instead")
    registers, stack = _resources(cubin, metadata.name)
    return Compiled(
        cubin=cubin,
        function=metadata.name,
        arguments=tuple(types),
        warps=metadata.num_warps,
        shared=metadata.shared,
        registers=registers,
        spill_bytes=stack,
        waits="griddepcontrol.wait" in ptx,
        maps=_map_layouts(kernel, metadata),
        ptx=ptx,
    )


def _compile_source(kernel: Kernel) -> Compiled:
    try:
        made = nvrtc.compile_source(kernel.function, kernel.constants, kernel.arch)
    except PlanError as error:
        raise PlanError(f"{_label(kernel)} does not compile: {error}") from None
    return Compiled(
        cubin=made.cubin,
        function=kernel.name,
        arguments=tuple(name for name, _ in kernel.signature),
        warps=made.threads // 32,
        shared=made.shared,
        registers=made.registers,
        spill_bytes=made.stack,
        waits="griddepcontrol.wait" in made.ptx,
        maps={},
        ptx=made.ptx,
        null_pointers=0,
        cluster=made.cluster,
    )


def _reasons(error: BaseException) -> str:
    """Messages from the call in the outermost function to what is wrong in the innermost."""
    found = [str(error)]
    while (cause := error.__cause__) is not None:
        found.append(str(cause))
        error = cause
    return "\n".join(found)


def _map_layouts(kernel: Kernel, metadata: Any) -> dict[str, MapLayout]:
    names = [name for name, kind in kernel.signature if kind.startswith("tensordesc")]
    layouts = getattr(metadata, "tensordesc_meta", None) or []
    if len(names) != len(layouts):
        raise PlanError(f"{_label(kernel)} uses tensor maps, which compute capability {kernel.arch} lacks")
    return {
        name: MapLayout(
            tuple(layout["block_size"]),
            layout["swizzle"],
            _driver_element_type(layout["elem_type"]),
        )
        for name, layout in zip(names, layouts, strict=True)
    }


def _driver_element_type(number: int) -> int:
    """Triton numbers the element types of tensor maps as the device does; three differ from the driver's."""
    return {8: 10, 9: 8, 10: 9}.get(number, number)


def _label(kernel: Kernel) -> str:
    constants = ", ".join(f"{k}={v}" for k, v in kernel.constants)
    return f"{kernel.function} ({constants}) for compute capability {kernel.arch}"


def _resources(cubin: bytes, function: str) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, as the assembler recorded them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(rf"Function {re.escape(function)}:\s*REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise PlanError(f"cuobjdump says nothing about {function}: {text}")
    return int(match[1]), int(match[2])
