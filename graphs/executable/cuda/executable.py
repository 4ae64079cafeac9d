"""The CUDA executable: a plan's graphs on one GPU. Neither torch nor triton, and nothing is compiled here.

Loading goes by the plan's arithmetic: kernels, one allocation for each region, the weights by threads, the
graphs. A step is then one copy in, one graph launch, one copy out, all in one
stream: the host returns at once, prepares the next step in the other pinned buffer, and reads the results
when it wants them.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import numpy as np

from makeready.graphs.checkpoint.base import NUMPY_DTYPES, Checkpoint
from makeready.graphs.executable.cuda import memory as cuda_memory
from makeready.graphs.executable.cuda.compatible import capability, check_capability, check_version
from makeready.graphs.executable.cuda.conversions import Converter
from makeready.graphs.executable.cuda.convert import convert
from makeready.graphs.executable.cuda.driver import Driver, DriverError, Function
from makeready.graphs.executable.cuda.graph import GraphBuilder
from makeready.graphs.executable.cuda.staging import Flight, PendingStep, SlotTable
from makeready.graphs.executable.cuda.weights import Progress, Upload
from makeready.graphs.executable.cuda.workbench import Workbench
from makeready.graphs.executable.match import check_checkpoint
from makeready.graphs.executable.unowned import Held, unowned
from makeready.graphs.plan.devices import chosen_for_another
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import Chain
from makeready.graphs.plan.spec import Bucket
from makeready.kernels.spec import DTYPE_BYTES, PAGES

Report = Callable[[str], None]


class CudaExecutable:
    """A plan for an NVIDIA GPU, loaded. See :class:`makeready.graphs.executable.base.Executable`.

    Args:
        plan: what to run.
        checkpoint: the weights; must be the one that the plan was made for.
        kv_bytes: memory for KV pages; None takes what is free, less the plan's own memory and a reserve.
        ordinal: which GPU.
        driver: the driver to call; None takes this machine's.
        progress: told how many of how many parameters are loaded.
        report: told in sentences if the plan was chosen for another device, and where the number of KV pages
            comes from.

    Attributes:
        startup: seconds of each phase of loading.

    Raises:
        PlanError: another checkpoint's plan, or the GPU, its driver or its memory do not fit the plan.
        DriverError: there is no GPU, or the driver refuses something else.
    """

    asynchronous = True

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        *,
        kv_bytes: int | None = None,
        ordinal: int = 0,
        driver: Driver | None = None,
        progress: Progress = lambda done, total: None,
        report: Report = lambda sentence: None,
    ) -> None:
        self.plan = plan
        self.startup: dict[str, float] = {}
        made_for = capability(plan.target)
        check_checkpoint(plan, checkpoint)
        # What is made from here on is given back in reverse, on close or with the executable.
        self._undo: list[Callable[[], None]] = []
        self._finalizer = weakref.finalize(self, _undo_all, self._undo)
        self._finalizer.atexit = False  # the driver cleans up behind a process
        self._upload = Upload(plan, checkpoint, progress)  # maps files already
        try:
            self._open(driver, ordinal)
            check_capability(plan.target, made_for, self._device)
            another = chosen_for_another(plan, self._device.name)
            if another is not None:
                report(another)
            self._load(kv_bytes, report)
        except BaseException:
            self._upload.close()
            with suppress(DriverError):  # the first error says more
                self.close()
            raise

    def _open(self, driver: Driver | None, ordinal: int) -> None:
        with self._phase("imports"):
            self._driver = driver = driver or Driver()
        with self._phase("context"):
            check_version(self.plan.target, driver.initialise())
            self._device = device = driver.open(ordinal)
        self._keep(partial(driver.release, device))

    def _load(self, kv_bytes: int | None, report: Report) -> None:
        plan, driver, upload = self.plan, self._driver, self._upload
        with self._phase("cubins"):
            functions = self._load_kernels()
        with self._phase("memory"):
            room = cuda_memory.kv_memory(plan, driver.memory()[0], kv_bytes)
            self.pages = room.pages
            self.blocks: Mapping[str, int] = plan.kv.blocks(room.pages, plan.limits)
            self._regions = regions = cuda_memory.allocate(driver, plan, self.pages)
            self._keep(partial(cuda_memory.release, driver, regions.allocations))
        report(room.sentence(plan))
        self._free = driver.memory()[0]
        with self._phase("buffers"):
            self._make_buffers()
        # One after the other: together they take as long, the driver's lock and the interpreter's going to and fro.
        with self._phase("weights"):
            upload.start(driver, self._device, regions.weights, self._converter(functions))
            self._keep(upload.close)
            upload.wait()
        with self._phase("graphs"):
            self._graphs = self._build_graphs(functions)
        self._cut_graphs: dict[Bucket, tuple[list[Any], Any]] = {}
        self._at_cut: tuple[Any, Flight, int] | None = None
        self._turn = 0
        self._keep(partial(driver.synchronize, self._stream))
        self._keep(partial(driver.use, self._device))  # in whatever thread everything is given back

    def _converter(self, functions: Mapping[str, Function]) -> Converter | None:
        loading, regions = self.plan.loading, self._regions
        if loading is None:
            return None
        return Converter(self._driver, self.plan, loading, functions, regions.arena, regions.weights)

    def _make_buffers(self) -> None:
        plan, driver = self.plan, self._driver
        self._stream = stream = driver.stream()
        self._keep(partial(driver.destroy_stream, stream))
        self._keep(partial(driver.synchronize, stream))  # what follows may fail halfway
        self._clear()
        self._flights = tuple(Flight(driver, plan) for _ in range(2))
        for flight in self._flights:
            self._keep(flight.close)
        self._slots = SlotTable(driver, plan, self._regions.slot, stream)

    @property
    def driver(self) -> Driver:
        """The driver that everything is launched by, for who measures."""
        return self._driver

    @cached_property
    def graph_bytes(self) -> int:
        """Device memory that the driver took for graphs and for what passes between host and GPU.

        Waits until the files that parameters came from are let go: while pinned they take some as well.
        """
        self._upload.close()
        self._driver.use(self._device)
        return self._free - self._driver.memory()[0]

    def write_slot(self, slot: int, values: Mapping[str, Any]) -> None:
        self._driver.use(self._device)
        self._slots.write(slot, values)

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> PendingStep:
        if not self._finalizer.alive:
            raise PlanError("the model is closed; load it again")
        self.resume({})
        driver, regions, stream = self._driver, self._regions, self._stream
        driver.use(self._device)
        self._turn ^= 1
        flight = self._flights[self._turn]
        step_bytes, result_bytes = flight.take(bucket, step)
        driver.to_device(regions.step, flight.step, step_bytes, stream)
        if cut:
            heads, tail = self._parts(bucket)
            for number, head in enumerate(heads, 1):
                driver.launch(head, stream)
                if number < len(heads):
                    flight.bring_early(bucket, regions.result, stream)
            self._at_cut = (tail, flight, result_bytes)
        else:
            driver.launch(self._graphs[bucket], stream)
            self._collect(flight, result_bytes)
        return flight.pending

    def resume(self, late: Mapping[int, Mapping[str, Any]]) -> None:
        if self._at_cut is None:
            return
        (tail, flight, result_bytes), self._at_cut = self._at_cut, None
        self._driver.use(self._device)
        for slot, values in late.items():
            self._slots.write_late(slot, values)
        self._driver.launch(tail, self._stream)
        self._collect(flight, result_bytes)

    def _collect(self, flight: Flight, result_bytes: int) -> None:
        """Behind a step's last launch its results go to the host."""
        self._driver.to_host(flight.result, self._regions.result, result_bytes, self._stream)
        self._driver.record(flight.event, self._stream)

    def _parts(self, bucket: Bucket) -> tuple[list[Any], Any]:
        """Graphs of the launches before the cut of ``bucket`` and of the others, made when first asked for.

        Of those before, early results are there behind the first of two.
        """
        found = self._cut_graphs.get(bucket)
        if found is None:
            addresses = cuda_memory.bucket_addresses(self.plan, self._regions, self._lasting, bucket)
            early, at = self.plan.early(bucket.phase), self.plan.cut(bucket.phase)
            made = []
            for begin, end in itertools.pairwise((*((0, early) if early else (0,)), at, None)):
                made.append(self._builder.build(bucket, addresses, self._stream, only=slice(begin, end)))
                self._keep(partial(self._driver.destroy_executable, made[-1]))
            *heads, tail = made
            found = self._cut_graphs[bucket] = (heads, tail)
        return found

    def poison(self, held: Sequence[Held] | None = None) -> None:
        """Fill arena, results and the null page with NaN patterns: what a step reads, it must have written.

        Args:
            held: the sequences on the device; whatever belongs to none of them is poisoned as well.
        """
        driver, regions = self._driver, self._regions
        driver.use(self._device)
        driver.fill(regions.arena, 0xFF, self.plan.memory.arena, self._stream)
        driver.fill(regions.result, 0xFF, self.plan.memory.result, self._stream)
        for part in (part for group in self.plan.kv.paged for part in group.parts):
            driver.fill(self._lasting[part.name], 0xFF, part.page_bytes, self._stream)
        if held is not None:
            for name, start, stop in unowned(self.plan, self.blocks, held):
                driver.fill(self._lasting[name] + start, 0xFF, stop - start, self._stream)
            self._slots.forget(set(range(self.plan.limits.slots)) - {one.slot for one in held})

    def operand(self, bucket: Bucket, op: str, operand: str) -> np.ndarray:
        """A copy of what the first launch of ``op`` in ``bucket`` reads as ``operand``, for comparisons.

        After a step this is what that launch saw, unless a later launch reused the place. Floating dtypes
        come as float32, 8-bit ones as their bits.
        """
        program = self.plan.programs[bucket.phase]
        name = next(launch.operands[operand] for launch in program.launches if launch.op == op)
        rows, dtype = self.peek(bucket, name), self.plan.spec(bucket.phase, name).dtype
        if dtype in ("float16", "bfloat16"):
            stored = rows if dtype == "bfloat16" else rows.view(np.float16)
            return convert(stored, dtype, "float32")
        return rows.view(NUMPY_DTYPES[dtype])

    def calls(self, bucket: Bucket) -> list[Chain]:
        """What a step in ``bucket`` runs, in order."""
        return self._builder.calls(bucket)

    def walk(
        self, bucket: Bucket, step: Mapping[str, np.ndarray], stops: Iterable[int] | None = None
    ) -> Iterator[int]:
        """Run a step as :meth:`launch` does, with pauses; see :mod:`makeready.graphs.executable.bisect`.

        Args:
            stops: numbers of launches, rising; None pauses behind each of :meth:`calls`. Launches between two are one
                graph.

        Yields:
            How many launches have run; meanwhile :meth:`peek` and :meth:`poke` see what they left.
        """
        driver, regions, stream = self._driver, self._regions, self._stream
        addresses = cuda_memory.bucket_addresses(self.plan, regions, self._lasting, bucket)
        driver.use(self._device)
        driver.synchronize(stream)
        step_bytes = self._flights[self._turn].take(bucket, step)[0]
        driver.to_device(regions.step, self._flights[self._turn].step, step_bytes, stream)
        driver.record(self._flights[self._turn].event, stream)
        done = 0
        for stop in (call.stop for call in self.calls(bucket)) if stops is None else stops:
            driver.use(self._device)
            graph = self._builder.build(bucket, addresses, stream, only=slice(done, stop))
            try:
                driver.launch(graph, stream)
                driver.synchronize(stream)
            finally:
                driver.destroy_executable(graph)
            done = stop
            yield done

    def peek(self, bucket: Bucket, name: str) -> np.ndarray:
        """A copy of the value that launches in ``bucket`` call ``name``, as the bits of its elements."""
        return self._rows(bucket, name, lambda rows: None).copy()

    def poke(self, bucket: Bucket, name: str, bits: np.ndarray) -> None:
        """Set the value that launches in ``bucket`` call ``name``."""

        def change(rows: np.ndarray) -> np.ndarray:
            rows[...] = bits.view(rows.dtype)
            return rows

        self._rows(bucket, name, change)

    def _rows(
        self, bucket: Bucket, name: str, change: Callable[[np.ndarray], np.ndarray | None]
    ) -> np.ndarray:
        """The value ``name`` as bits, read from the device and written back where ``change`` gives something."""
        spec, buffer = self.plan.spec(bucket.phase, name), self.plan.programs[bucket.phase].buffers.get(name)
        group = next((g for g in self.plan.kv.groups if any(p.name == name for p in g.parts)), None)
        shape = spec.at({**bucket.sizes, PAGES: self.pages if group is None else self.blocks[group.name]})
        size, row = DTYPE_BYTES[spec.dtype], int(np.prod(shape[1:], dtype=np.int64))
        stride = row if buffer is None or buffer.row_stride is None else buffer.row_stride
        bits = np.empty(max((shape[0] - 1) * stride + row, 0), np.dtype(f"u{size}"))
        address = cuda_memory.bucket_addresses(self.plan, self._regions, self._lasting, bucket)[name]
        self._driver.use(self._device)
        self._driver.to_host(bits.ctypes.data, address, bits.nbytes, self._stream)
        self._driver.synchronize(self._stream)
        rows = np.lib.stride_tricks.as_strided(bits, (shape[0], row), (stride * size, size)).reshape(shape)
        if change(rows) is not None:
            self._driver.to_device(address, bits.ctypes.data, bits.nbytes, self._stream)
            self._driver.synchronize(self._stream)
        return rows

    def workbench(self) -> Workbench:
        """Graphs of any choices, for measuring; destroyed with the executable at the latest."""
        bench = Workbench(
            self._driver,
            self._device,
            self._stream,
            self._builder,
            lambda bucket: cuda_memory.bucket_addresses(self.plan, self._regions, self._lasting, bucket),
        )
        self._keep(bench.close)
        return bench

    def fill_cache(self, seed: int = 0) -> None:
        """Random keys and values of magnitude 0.5 to 2 in all pages: kernels run faster on zeros."""
        cuda_memory.fill_random(self._driver, self._device, self.plan, self._lasting, self.pages, seed)

    def close(self) -> None:
        """See :meth:`makeready.graphs.executable.base.Executable.close`; what the driver refuses is told last.

        Raises:
            DriverError: something could not be given back, as after a fault on the device.
        """
        self._finalizer()

    def _load_kernels(self) -> dict[str, Function]:
        functions, driver = {}, self._driver
        for key, binary in self.plan.binaries.items():
            what = f"kernel {binary.function} of the plan for {self.plan.target}"
            image = self.plan.cubins.get(key)
            if image is None:
                raise PlanError(f"the machine code of {what} is missing; carry the plan's whole folder here")
            try:
                library = driver.load(image)
                self._keep(partial(driver.unload, library))
                functions[key] = driver.function(library, binary.function, 32 * binary.warps, binary.shared)
            except DriverError as error:
                raise PlanError(
                    f"{what} does not load on {self._device.name}: {error}; compile the plan again"
                ) from None
        return functions

    def _clear(self) -> None:
        """Counters in scratch start at zero, and a page is read up to its last written token only."""
        kv = cuda_memory.kv_offsets(self.plan, self.pages)[1]
        self._driver.fill(self._regions.scratch, 0, self.plan.memory.scratch, self._stream)
        self._driver.fill(self._regions.kv, 0, kv, self._stream)

    def _build_graphs(self, functions: Mapping[str, Function]) -> dict[Bucket, Any]:
        plan, driver, regions = self.plan, self._driver, self._regions
        self._builder = builder = GraphBuilder(
            driver,
            plan,
            functions,
            scratch=regions.scratch,
            # A map's bound: a group of fewer blocks has no higher numbers in its page lists.
            pages=max(self.blocks.values()),
            device=self._device.name,
        )
        self._lasting = cuda_memory.lasting_addresses(plan, regions, self.pages)
        graphs = {}
        for bucket in plan.buckets:
            addresses = cuda_memory.bucket_addresses(plan, regions, self._lasting, bucket)
            graph = graphs[bucket] = builder.build(bucket, addresses, self._stream)
            self._keep(partial(driver.destroy_executable, graph))
        driver.synchronize(self._stream)
        return graphs

    def _keep(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.startup[name] = time.perf_counter() - start


def _undo_all(undo: list[Callable[[], None]]) -> None:
    """Give everything back, in reverse; where the driver refuses something, the rest all the same."""
    refused: DriverError | None = None
    while undo:
        try:
            undo.pop()()
        except DriverError as error:
            refused = refused or error
    if refused is not None:
        raise refused
