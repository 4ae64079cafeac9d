# ruff: noqa: N802 (names are the driver's)
"""A CUDA driver without a GPU: stands in for ``cuda.bindings.driver`` and records what it is told.

Device memory is host memory, so copies really copy. Streams are queues that run when somebody waits for
them, so whoever overwrites a pinned buffer too early sees wrong bytes. A cubin is JSON that names its kernel
and the sizes of its parameters; running a graph calls :attr:`FakeBindings.on_launch` with its nodes.
Structures and enumerations are the package's own.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_objects import FakeFunction, FakeMap, FakeNode

real = pytest.importorskip("cuda.bindings.driver")

OK = (real.CUresult.CUDA_SUCCESS,)
INVALID = (real.CUresult.CUDA_ERROR_INVALID_VALUE,)
PAGE = 4096


@dataclass
class FakeBindings:
    """The module. Fields that tests set come first, then what it recorded.

    Attributes:
        refuse: status that a call returns instead of doing anything, by the call's name.
        on_launch: run when a graph's turn in its stream comes.
        graph_ms: how long it takes, as events tell.
        copy_ms: how long a byte takes from device memory to device memory; nothing else takes time.
        name: of the GPU.
        on_kernel: run when the turn of a kernel that was launched by itself comes.
    """

    version: int = 13000
    capability: tuple[int, int] = (9, 0)
    devices: int = 1
    memory: int = 280 * 2**20  # a cache may take what is free, and every byte is written
    registers_files: bool = True
    refuse: dict[str, Any] = field(default_factory=dict)
    on_launch: Callable[[list[FakeNode]], None] = lambda nodes: None
    graph_ms: Callable[[list[FakeNode]], float] = lambda nodes: 1.0
    copy_ms: float = 0.0
    on_kernel: Callable[[FakeNode], None] = lambda node: None
    name: bytes = b"Fake GPU"

    calls: list[str] = field(default_factory=list)
    copies: list[tuple[str, int, int, int]] = field(default_factory=list)  # kind, target, source, bytes
    graphs: list[list[FakeNode]] = field(default_factory=list)
    launched: list[int] = field(default_factory=list)  # graphs, by their place in ``graphs``
    maps: dict[bytes, FakeMap] = field(default_factory=dict)
    registered: dict[int, int] = field(default_factory=dict)
    allocations: dict[int, np.ndarray] = field(default_factory=dict)
    pinned: dict[int, np.ndarray] = field(default_factory=dict)
    freed: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._objects: dict[int, Any] = {}
        self._next = 1
        self._context = threading.local()
        self.retained = 0
        self.clock = 1.0

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cu") or name in ("cuuint64_t", "cuuint32_t"):
            return super().__getattribute__(name)
        refused = self.refuse.get(name)
        if refused is not None:
            return lambda *args: (refused,) if isinstance(refused, real.CUresult) else refused(*args)
        call = super().__getattribute__(name)

        def recorded(*args: Any) -> Any:
            with self._lock:
                self.calls.append(name)
                return call(*args)

        return recorded

    def __getattr__(self, name: str) -> Any:
        """Structures, enumerations and constants of the package."""
        return getattr(real, name)

    def _made(self, thing: Any) -> int:
        self._next += 1
        self._objects[self._next] = thing
        return self._next

    @property
    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return sum(len(a) for a in self.allocations.values())

    # -- device

    def cuInit(self, flags):
        return OK

    def cuGetErrorName(self, status):
        return (*OK, status.name.encode())

    def cuGetErrorString(self, status):
        return (*OK, b"as the test wants")

    def cuDriverGetVersion(self):
        return (*OK, self.version)

    def cuDeviceGetCount(self):
        return (*OK, self.devices)

    def cuDeviceGet(self, ordinal):
        return (*OK, real.CUdevice(ordinal))

    def cuDeviceGetName(self, length, device):
        return (*OK, self.name.ljust(length, b"\0"))

    def cuDeviceGetAttribute(self, which, device):
        minor = which == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        return (*OK, self.capability[minor])

    def cuDevicePrimaryCtxRetain(self, device):
        self.retained += 1
        return (*OK, real.CUcontext(77))

    def cuDevicePrimaryCtxRelease(self, device):
        self.retained -= 1
        return OK

    def cuCtxSetCurrent(self, context):
        self._context.current = int(context)
        return OK

    # -- memory

    def cuMemGetInfo(self):
        return (*OK, self.memory - self.used, self.memory)

    def cuMemAlloc(self, nbytes):
        assert self._context.current == 77, "no context is current in this thread"
        if self.used + nbytes > self.memory:
            return (real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
        memory = np.full(nbytes + 256, 0xAB, np.uint8)
        start = -memory.ctypes.data % 256
        memory = memory[start : start + nbytes]
        self.allocations[memory.ctypes.data] = memory
        return (*OK, real.CUdeviceptr(memory.ctypes.data))

    def cuMemFree(self, address):
        self.freed += 1
        del self.allocations[int(address)]
        return OK

    def cuMemHostAlloc(self, nbytes, flags):
        memory = np.full(nbytes, 0xCD, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return (*OK, memory.ctypes.data)

    def cuMemFreeHost(self, address):
        del self.pinned[address]
        return OK

    def cuMemHostRegister(self, address, nbytes, flags):
        if not self.registers_files:
            return (real.CUresult.CUDA_ERROR_NOT_SUPPORTED,)
        assert flags == real.CU_MEMHOSTREGISTER_READ_ONLY
        assert address % PAGE == 0
        assert nbytes % PAGE == 0
        for start, length in self.registered.items():
            if address < start + length and start < address + nbytes:
                return (real.CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,)
        self.registered[address] = nbytes
        return OK

    def cuMemHostUnregister(self, address):
        del self.registered[address]
        return OK

    def cuMemcpyHtoDAsync(self, target, source, nbytes, stream):
        assert self._context.current == 77, "no context is current in this thread"
        self._inside(target, nbytes)
        self.copies.append(("in", target, source, nbytes))
        if self._is_pinned(source, nbytes):
            self._queue(stream).append(lambda: ctypes.memmove(target, source, nbytes))
        else:
            kept = ctypes.string_at(source, nbytes)
            self._queue(stream).append(lambda: ctypes.memmove(target, kept, nbytes))
        return OK

    def cuMemcpyDtoHAsync(self, target, source, nbytes, stream):
        self._inside(source, nbytes)
        self.copies.append(("out", target, source, nbytes))
        self._queue(stream).append(lambda: ctypes.memmove(target, source, nbytes))
        return OK

    def cuMemcpyDtoDAsync(self, target, source, nbytes, stream):
        self._inside(source, nbytes)
        self._inside(target, nbytes)
        self.copies.append(("across", target, source, nbytes))
        self._queue(stream).append(lambda: self._across(target, source, nbytes))
        return OK

    def _across(self, target, source, nbytes):
        ctypes.memmove(target, source, nbytes)
        self.clock += nbytes * self.copy_ms

    def cuMemsetD8Async(self, target, byte, nbytes, stream):
        self._inside(target, nbytes)
        self._queue(stream).append(lambda: ctypes.memset(target, byte, nbytes))
        return OK

    def _inside(self, address, nbytes):
        assert any(a <= address and address + nbytes <= a + len(m) for a, m in self.allocations.items())

    def _is_pinned(self, address, nbytes):
        pinned = {a: len(m) for a, m in self.pinned.items()} | self.registered
        for start, length in pinned.items():
            if start <= address < start + length:
                assert address + nbytes <= start + length, "the copy leaves the pinned range"
                return True
        return False

    # -- order

    def cuStreamCreate(self, flags):
        return (*OK, real.CUstream(self._made(deque())))

    def cuStreamDestroy(self, stream):
        assert not self._objects.pop(int(stream)), "the stream still has work"
        return OK

    def cuStreamSynchronize(self, stream):
        queue = self._queue(stream)
        while queue:
            queue.popleft()()
        return OK

    def cuEventCreate(self, flags):
        return (*OK, real.CUevent(self._made([])))

    def cuEventDestroy(self, event):
        del self._objects[int(event)]
        return OK

    def cuEventRecord(self, event, stream):
        happened: list[float] = []
        self._objects[int(event)] = [happened, self._queue(stream)]
        self._queue(stream).append(lambda: happened.append(self.clock))
        return OK

    def cuEventElapsedTime(self, start, end):
        (begun, _), (ended, _) = self._objects[int(start)], self._objects[int(end)]
        return (*OK, ended[0] - begun[0])

    def cuEventSynchronize(self, event):
        if self._objects[int(event)]:
            happened, queue = self._objects[int(event)]
            while not happened:
                queue.popleft()()
        return OK

    def _queue(self, stream):
        return self._objects[int(stream)]

    # -- kernels

    def cuLibraryLoadData(self, image, *options):
        try:
            made = json.loads(image)
        except ValueError:
            return (real.CUresult.CUDA_ERROR_INVALID_IMAGE, None)
        return (*OK, real.CUlibrary(self._made(FakeFunction(made["name"], made["sizes"]))))

    def cuLibraryUnload(self, library):
        del self._objects[int(library)]
        return OK

    def cuLibraryGetKernel(self, library, name):
        if self._objects[int(library)].name != name.decode():
            return (real.CUresult.CUDA_ERROR_NOT_FOUND, None)
        return (*OK, real.CUkernel(int(library)))

    def cuKernelGetFunction(self, kernel):
        return (*OK, real.CUfunction(int(kernel)))

    def cuFuncSetAttribute(self, function, which, value):
        assert which == real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._objects[int(function)].dynamic_shared = value
        return OK

    def cuTensorMapEncodeTiled(self, kind, rank, address, shape, strides, box, steps, *options):
        assert address % 16 == 0
        assert all(int(s) % 16 == 0 for s in strides), "TMA strides are multiples of 16 bytes"
        made = FakeMap(
            int(kind),
            rank,
            address,
            *([int(n) for n in numbers] for numbers in (shape, strides, box, steps)),
            tuple(int(option) for option in options),
        )
        encoded = real.CUtensorMap()
        encoded.opaque = [real.cuuint64_t((len(self.maps) + 1) * 1000 + i) for i in range(16)]
        self.maps[ctypes.string_at(encoded.getPtr(), 128)] = made
        return (*OK, encoded)

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert self._context.current == 77, "no context is current in this thread"
        assert extra == 0
        function = self._objects[int(function)]
        if shared > function.dynamic_shared:
            return INVALID
        # The driver copies parameters before it returns.
        values = self._parameters(function, parameters)
        node = FakeNode(function, (gx, gy, gz), (bx, by, bz), shared, values)
        self._queue(stream).append(lambda: self.on_kernel(node))
        return OK

    def _parameters(self, function, address):
        table = (ctypes.c_uint64 * len(function.sizes)).from_address(address)
        for place, size in zip(table, function.sizes, strict=True):
            assert place % min(size, 64) == 0, "a parameter is not aligned"
        return [ctypes.string_at(a, size) for a, size in zip(table, function.sizes, strict=True)]

    # -- graphs

    def cuGraphCreate(self, flags):
        return (*OK, real.CUgraph(self._made([])))

    def cuGraphDestroy(self, graph):
        del self._objects[int(graph)]
        return OK

    def cuGraphAddNode(self, graph, before, edges, count, params):
        nodes = self._objects[int(graph)]
        assert params.type == real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
        kernel = params.kernel
        function = self._objects[int(kernel.func)]
        if kernel.sharedMemBytes > function.dynamic_shared:
            return (*INVALID, None)
        parameters = self._parameters(function, int(kernel.kernelParams))
        behind = [
            (int(node) - 1, self._kind(edge)) for node, edge in zip(before or (), edges or (), strict=True)
        ]
        assert len(behind) == count
        if len({other for other, _ in behind}) < count:
            return (*INVALID, None)
        nodes.append(
            FakeNode(
                function,
                (kernel.gridDimX, kernel.gridDimY, kernel.gridDimZ),
                (kernel.blockDimX, kernel.blockDimY, kernel.blockDimZ),
                kernel.sharedMemBytes,
                parameters,
                tuple(behind),
            )
        )
        return (*OK, real.CUgraphNode(len(nodes)))

    def _kind(self, edge):
        programmatic = int(edge.type) == int(real.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
        assert (edge.from_port, edge.to_port) == ((1, 0) if programmatic else (0, 0))
        return "programmatic" if programmatic else "plain"

    def cuGraphInstantiate(self, graph, flags):
        self.graphs.append(list(self._objects[int(graph)]))
        return (*OK, real.CUgraphExec(self._made(len(self.graphs) - 1)))

    def cuGraphUpload(self, executable, stream):
        return OK

    def cuGraphExecDestroy(self, executable):
        del self._objects[int(executable)]
        return OK

    def cuGraphLaunch(self, executable, stream):
        index = self._objects[int(executable)]
        self.launched.append(index)

        def run():
            self.on_launch(self.graphs[index])
            self.clock += self.graph_ms(self.graphs[index])

        self._queue(stream).append(run)
        return OK

    def check_released(self) -> None:
        """Nothing is left of what was made."""
        assert not self.allocations
        assert not self.pinned
        assert not self.registered
        assert not self._objects
        assert self.retained == 0
