"""The CUDA driver as this project uses it: plain integers in and out, and errors that are sentences.

A thin layer over ``cuda.bindings.driver``; nothing else imports that package. Addresses, sizes and
enumerations are integers; streams, events, functions and graphs are the package's handles, passed through.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from makeready.graphs.plan.plan import PlanError

BINDINGS = "cuda.bindings.driver"


class DriverError(PlanError):
    """The CUDA driver refused a call; the message names call, code and meaning."""


def load_bindings() -> Any:
    """The module ``cuda.bindings.driver``.

    Raises:
        DriverError: the package is not installed.
    """
    try:
        return importlib.import_module(BINDINGS)
    except ImportError as error:
        raise DriverError(
            f"{BINDINGS} cannot be imported ({error}); install cuda-bindings to run on a GPU"
        ) from None


def host_bytes(address: int, nbytes: int) -> np.ndarray:
    """Host memory as an array of bytes; whoever owns the memory must outlive it."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


@dataclass(frozen=True)
class Device:
    """A GPU and its primary context.

    Attributes:
        capability: compute capability, such as (9, 0).
        handle, context: the driver's own.
    """

    ordinal: int
    name: str
    capability: tuple[int, int]
    handle: Any
    context: Any


@dataclass(frozen=True)
class Function:
    """A loaded kernel and how it is launched: threads of a block, bytes of dynamic shared memory."""

    handle: Any
    threads: int
    shared: int


class Driver:
    """The calls, each checked.

    Args:
        bindings: the module to call; None imports ``cuda.bindings.driver``.

    Raises:
        DriverError: from every method, where the driver reports an error.
    """

    def __init__(self, bindings: Any = None) -> None:
        self.cu = load_bindings() if bindings is None else bindings
        cu = self.cu
        self._node = cu.CUgraphNodeParams()
        self._node.type = cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
        self._plain = cu.CUgraphEdgeData()  # all zeros: the node before must have ended
        self._programmatic = cu.CUgraphEdgeData()
        self._programmatic.type = cu.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
        # Port 1 of a kernel node fires when all its blocks called griddepcontrol.launch_dependents or ended.
        self._programmatic.from_port = 1

    def _check(self, call: str, result: tuple[Any, ...]) -> Any:
        """The values behind the status code; one alone, several as a tuple."""
        status, *values = result
        if status:
            raise DriverError(f"{call} failed with {self._describe(status)}")
        return values[0] if len(values) == 1 else tuple(values)

    def _describe(self, status: Any) -> str:
        texts = (self.cu.cuGetErrorName(status), self.cu.cuGetErrorString(status))
        name, meaning = (t[1].decode() if not t[0] and t[1] else str(int(status)) for t in texts)
        return f"{name} ({meaning})"

    # -- device -----------------------------------------------------------------------------------------

    def initialise(self) -> int:
        """Start the driver and return the CUDA version it supports, such as 13000 for 13.0."""
        try:
            self._check("cuInit", self.cu.cuInit(0))
        except (RuntimeError, DriverError) as error:  # the bindings raise the former without libcuda.so
            raise DriverError(
                f"no NVIDIA driver can be used here ({error}); run the plan on a machine with its GPU, "
                "or compile one for target=cpu"
            ) from None
        return self._check("cuDriverGetVersion", self.cu.cuDriverGetVersion())

    def open(self, ordinal: int) -> Device:
        """Retain the primary context of a GPU and make it current in this thread."""
        cu = self.cu
        count = self._check("cuDeviceGetCount", cu.cuDeviceGetCount())
        if ordinal >= count:
            raise DriverError(f"GPU {ordinal} was asked for, the driver sees {count}")
        handle = self._check("cuDeviceGet", cu.cuDeviceGet(ordinal))
        name = self._check("cuDeviceGetName", cu.cuDeviceGetName(128, handle))
        attribute = cu.CUdevice_attribute
        major, minor = (
            self._check("cuDeviceGetAttribute", cu.cuDeviceGetAttribute(which, handle))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        context = self._check("cuDevicePrimaryCtxRetain", cu.cuDevicePrimaryCtxRetain(handle))
        device = Device(ordinal, name.split(b"\0")[0].decode(), (major, minor), handle, context)
        self.use(device)
        return device

    def use(self, device: Device) -> None:
        """Make the device's context current in this thread."""
        self._check("cuCtxSetCurrent", self.cu.cuCtxSetCurrent(device.context))

    def release(self, device: Device) -> None:
        """Give the primary context back; the last release destroys it and all that it holds."""
        self._check("cuDevicePrimaryCtxRelease", self.cu.cuDevicePrimaryCtxRelease(device.handle))

    # -- memory -----------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the current device."""
        return self._check("cuMemGetInfo", self.cu.cuMemGetInfo())

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory; of 256-byte alignment. No bytes are address 0."""
        if nbytes == 0:
            return 0
        return int(self._check(f"cuMemAlloc of {nbytes} bytes", self.cu.cuMemAlloc(nbytes)))

    def free(self, address: int) -> None:
        """Free what :meth:`allocate` gave."""
        if address:
            self._check("cuMemFree", self.cu.cuMemFree(address))

    def allocate_host(self, nbytes: int) -> int:
        """Address of new pinned host memory."""
        return int(self._check(f"cuMemHostAlloc of {nbytes} bytes", self.cu.cuMemHostAlloc(nbytes, 0)))

    def free_host(self, address: int) -> None:
        """Free what :meth:`allocate_host` gave."""
        self._check("cuMemFreeHost", self.cu.cuMemFreeHost(address))

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory that may be read-only, such as a mapped file, so that copies from it are direct."""
        flags = self.cu.CU_MEMHOSTREGISTER_READ_ONLY
        self._check("cuMemHostRegister", self.cu.cuMemHostRegister(address, nbytes, flags))

    def unregister(self, address: int) -> None:
        """Undo :meth:`register`."""
        self._check("cuMemHostUnregister", self.cu.cuMemHostUnregister(address))

    def to_device(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy host memory to the device, in the stream's order.

        Pageable memory of at most 64 KiB may be changed at once, as the driver keeps a copy; pinned memory
        only when the stream is past the copy.
        """
        self._check("cuMemcpyHtoDAsync", self.cu.cuMemcpyHtoDAsync(target, source, nbytes, stream))

    def to_host(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy device memory to the host, in the stream's order."""
        self._check("cuMemcpyDtoHAsync", self.cu.cuMemcpyDtoHAsync(target, source, nbytes, stream))

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy device memory to device memory, in the stream's order."""
        self._check("cuMemcpyDtoDAsync", self.cu.cuMemcpyDtoDAsync(target, source, nbytes, stream))

    def fill(self, target: int, byte: int, nbytes: int, stream: Any) -> None:
        """Set bytes of device memory, in the stream's order."""
        if nbytes:
            self._check("cuMemsetD8Async", self.cu.cuMemsetD8Async(target, byte, nbytes, stream))

    # -- order ------------------------------------------------------------------------------------------

    def stream(self) -> Any:
        """A stream that does not wait for the default one."""
        flag = self.cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._check("cuStreamCreate", self.cu.cuStreamCreate(int(flag)))

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream once its work is done."""
        self._check("cuStreamDestroy", self.cu.cuStreamDestroy(stream))

    def synchronize(self, stream: Any) -> None:
        """Wait until the stream is empty."""
        self._check("cuStreamSynchronize", self.cu.cuStreamSynchronize(stream))

    def event(self) -> Any:
        """An event that takes no time stamps, which makes it cheaper."""
        flag = self.cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return self._check("cuEventCreate", self.cu.cuEventCreate(int(flag)))

    def timer(self) -> Any:
        """An event that takes time stamps."""
        flag = self.cu.CUevent_flags.CU_EVENT_DEFAULT
        return self._check("cuEventCreate", self.cu.cuEventCreate(int(flag)))

    def seconds(self, start: Any, end: Any) -> float:
        """Between two timers that have happened, to half a microsecond."""
        return self._check("cuEventElapsedTime", self.cu.cuEventElapsedTime(start, end)) / 1e3

    def destroy_event(self, event: Any) -> None:
        """Destroy an event."""
        self._check("cuEventDestroy", self.cu.cuEventDestroy(event))

    def record(self, event: Any, stream: Any) -> None:
        """Let the event happen when the stream gets here."""
        self._check("cuEventRecord", self.cu.cuEventRecord(event, stream))

    def wait(self, event: Any) -> None:
        """Wait until the event has happened; one never recorded has."""
        self._check("cuEventSynchronize", self.cu.cuEventSynchronize(event))

    # -- kernels ----------------------------------------------------------------------------------------

    def load(self, image: bytes) -> Any:
        """A library of kernels from a cubin."""
        loaded = self.cu.cuLibraryLoadData(image, None, None, 0, None, None, 0)
        return self._check("cuLibraryLoadData", loaded)

    def unload(self, library: Any) -> None:
        """Unload a library."""
        self._check("cuLibraryUnload", self.cu.cuLibraryUnload(library))

    def function(self, library: Any, name: str, threads: int, shared: int) -> Function:
        """A kernel of a library, loaded into the current context."""
        cu = self.cu
        kernel = self._check("cuLibraryGetKernel", cu.cuLibraryGetKernel(library, name.encode()))
        handle = self._check("cuKernelGetFunction", cu.cuKernelGetFunction(kernel))
        if shared > 48 * 1024:  # what a block may have without asking
            which = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check("cuFuncSetAttribute", cu.cuFuncSetAttribute(handle, which, shared))
        return Function(handle, threads, shared)

    def tensor_map(
        self,
        address: int,
        element_type: int,
        shape: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle: int,
        promotion: int,
    ) -> bytes:
        """A TMA tensor map: the 128 bytes of a ``CUtensorMap``.

        Args:
            element_type: of ``CUtensorMapDataType``.
            shape, box: elements of each axis, of the tensor and of one copy, innermost first.
            strides: bytes between neighbours along each axis but the innermost.
            swizzle: of ``CUtensorMapSwizzle``.
            promotion: of ``CUtensorMapL2promotion``.
        """
        cu = self.cu
        encoded = self._check(
            f"cuTensorMapEncodeTiled of {list(shape)} elements in boxes of {list(box)}",
            cu.cuTensorMapEncodeTiled(
                cu.CUtensorMapDataType(element_type),
                len(shape),
                address,
                [cu.cuuint64_t(n) for n in shape],
                [cu.cuuint64_t(n) for n in strides],
                [cu.cuuint32_t(n) for n in box],
                [cu.cuuint32_t(1)] * len(shape),
                cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                cu.CUtensorMapSwizzle(swizzle),
                cu.CUtensorMapL2promotion(promotion),
                cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ),
        )
        return ctypes.string_at(encoded.getPtr(), 128)

    def launch_kernel(
        self, function: Function, grid: tuple[int, int, int], parameters: int, stream: Any
    ) -> None:
        """Run a kernel by itself, in the stream's order; ``parameters`` as in :meth:`add_kernel`."""
        launched = self.cu.cuLaunchKernel(
            function.handle, *grid, function.threads, 1, 1, function.shared, stream, parameters, 0
        )
        self._check("cuLaunchKernel", launched)

    # -- graphs -----------------------------------------------------------------------------------------

    def graph(self) -> Any:
        """An empty graph."""
        return self._check("cuGraphCreate", self.cu.cuGraphCreate(0))

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a graph; what was instantiated from it stays."""
        self._check("cuGraphDestroy", self.cu.cuGraphDestroy(graph))

    def add_kernel(
        self,
        graph: Any,
        function: Function,
        grid: tuple[int, int, int],
        parameters: int,
        after: Sequence[Any],
        programmatic: bool,
    ) -> Any:
        """Add a kernel node behind the nodes ``after``, or as a first one where there are none.

        Args:
            parameters: address of an array of addresses, one a parameter; the values are copied.
            programmatic: the kernel waits in its own code for those before it, and may start earlier.
        """
        kernel = self._node.kernel
        kernel.func = function.handle
        kernel.gridDimX, kernel.gridDimY, kernel.gridDimZ = grid
        kernel.blockDimX, kernel.blockDimY, kernel.blockDimZ = function.threads, 1, 1
        kernel.sharedMemBytes = function.shared
        kernel.kernelParams = parameters
        if not after:
            added = self.cu.cuGraphAddNode(graph, None, None, 0, self._node)
        else:
            edges = [self._programmatic if programmatic else self._plain] * len(after)
            added = self.cu.cuGraphAddNode(graph, list(after), edges, len(after), self._node)
        return self._check("cuGraphAddNode", added)

    def instantiate(self, graph: Any, stream: Any) -> Any:
        """An executable graph, its launch data on the device when the stream gets here."""
        made = self._check("cuGraphInstantiate", self.cu.cuGraphInstantiate(graph, 0))
        self._check("cuGraphUpload", self.cu.cuGraphUpload(made, stream))
        return made

    def destroy_executable(self, executable: Any) -> None:
        """Destroy what :meth:`instantiate` gave."""
        self._check("cuGraphExecDestroy", self.cu.cuGraphExecDestroy(executable))

    def launch(self, executable: Any, stream: Any) -> None:
        """Run an executable graph, in the stream's order."""
        self._check("cuGraphLaunch", self.cu.cuGraphLaunch(executable, stream))
