"""One compiled kernel put into a stream through the CUDA driver, its arguments taken from PyTorch's tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from makeready.graphs.planner.cuda.aot import Compiled, MapLayout
from makeready.graphs.planner.cuda.nodes import stated_layout
from makeready.kernels.device import Descriptor, DeviceLaunch, Pointer, Scalar, Scratch
from makeready.kernels.size import value

_C_TYPES = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}


def load(compiled: Compiled) -> Any:
    """The driver's function of ``compiled``, allowed the shared memory that it needs."""
    torch.cuda.current_stream()  # torch's context is the current one
    library = _ok(driver.cuLibraryLoadData(compiled.cubin, None, None, 0, None, None, 0))
    entry = _ok(driver.cuLibraryGetKernel(library, compiled.function.encode()))
    function = _ok(driver.cuKernelGetFunction(entry))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _ok(driver.cuFuncSetAttribute(function, limit, compiled.shared))
    return function


def start(
    function: Any,
    launch: DeviceLaunch,
    compiled: Compiled,
    tensors: Mapping[str, torch.Tensor],
    scratch: torch.Tensor,
    stream: torch.cuda.Stream,
) -> None:
    """Launch ``function``, which :func:`load` gave for ``compiled``, on ``stream`` and return at once."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = 32 * compiled.warps, 1, 1
    config.sharedMemBytes = compiled.shared
    config.hStream = driver.CUstream(stream.cuda_stream)
    if launch.dependent:
        assert compiled.waits, f"{launch.function} is dependent but never calls gdc_wait"
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [early], 1
    values = _parameters(launch, compiled, tensors, scratch)
    table = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    _ok(driver.cuLaunchKernelEx(config, function, ctypes.addressof(table), 0))


def _parameters(
    launch: DeviceLaunch, compiled: Compiled, tensors: Mapping[str, torch.Tensor], scratch: torch.Tensor
) -> list[Any]:
    """C values of all parameters, in the order of the machine code, Triton's null pointers last."""
    values: list[Any] = []
    for name in compiled.arguments:
        argument = launch.arguments[name]
        if isinstance(argument, Pointer):
            values.append(ctypes.c_uint64(tensors[argument.operand].data_ptr()))
        elif isinstance(argument, Scratch):
            values.append(ctypes.c_uint64(scratch.data_ptr() + argument.offset))
        elif isinstance(argument, Scalar):
            values.append(_C_TYPES[argument.dtype](argument.value))
        else:
            tensor = tensors[argument.operand]
            sizes = {"P": tensor.shape[0]}
            shape = [value(d, sizes) for d in argument.shape]
            layout = compiled.maps.get(name) or stated_layout(argument, dtype_name(tensor.dtype))
            values.append(_tensor_map(argument, tensor, shape, layout))
            if name in compiled.maps:
                values += [ctypes.c_int32(d) for d in shape]
                values += [ctypes.c_int64(s) for s in argument.strides]
    return [*values, *(ctypes.c_uint64(0) for _ in range(compiled.null_pointers))]


def _tensor_map(argument: Descriptor, tensor: torch.Tensor, shape: list[int], layout: MapLayout) -> Any:
    """A CUtensorMap, innermost axis first as the driver has it, encoded as Triton's launcher would."""
    size = tensor.element_size()
    made = _ok(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType(layout.element_type),
            len(shape),
            tensor.data_ptr(),
            [driver.cuuint64_t(d) for d in reversed(shape)],
            [driver.cuuint64_t(s * size) for s in reversed(argument.strides[:-1])],
            [driver.cuuint32_t(b) for b in reversed(layout.block)],
            [driver.cuuint32_t(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle(layout.swizzle),
            driver.CUtensorMapL2promotion(layout.promotion),
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return (ctypes.c_uint64 * 16).from_buffer_copy(ctypes.string_at(made.getPtr(), 128))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ok(answer: tuple[Any, ...]) -> Any:
    """What a driver call gave, or its error as an exception."""
    status, *values = answer
    if int(status) != 0:
        text = driver.cuGetErrorString(status)[1]
        raise RuntimeError(f"CUDA: {text.decode() if text else status}")
    return values[0] if values else None
