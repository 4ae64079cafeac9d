"""What the present GPU sustains, measured in the run whose floors it is for.

A floor is the least that a step can take on this very machine: bytes over the best bandwidth seen (a copy, or reads
alone), operations over the best rate seen of a large product. Both run on random numbers, without PyTorch, by the
planner's own kernels. Where those cannot be compiled, as without Triton, rates are the ones that
graphs/plan/devices.py has for the GPU, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from benchmarks.gpu import products
from benchmarks.gpu.products import FP8, INT8, Product
from makeready.graphs.executable.cuda.driver import Device, Driver
from makeready.graphs.plan.devices import Device as Figures
from makeready.graphs.plan.devices import device_named
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.targets import TARGETS, Target

COPIED = 2**30  # bytes of a copy, and of the weights that one row is multiplied with
SIDE = 8192  # of square products
SECONDS = 0.1  # of one measurement, at least
REPEATS = 5  # of which the fastest counts: a floor is what nothing beats
KEPT = 3  # of the planner's ways, of which the fastest counts


@dataclass(frozen=True)
class Rates:
    """Of a GPU.

    Attributes:
        gpu: the driver's name.
        copy: bytes/s of a copy within the GPU's memory, read and written; None where it was not measured.
        reads: bytes/s of reads alone; None likewise.
        bandwidth: the highest of them.
        flops: operations/s by dtype.
        source: "measured", or where the rates of products come from.
    """

    gpu: str
    copy: float | None
    reads: float | None
    bandwidth: float
    flops: dict[str, float]
    source: str

    def floor(self, nbytes: float, operations: float = 0.0, dtype: str = "bfloat16") -> float:
        """Seconds that moving these bytes, or computing this much, takes at least."""
        return max(nbytes / self.bandwidth, operations / self.flops[dtype])

    def on(self, target: Target) -> Target:
        """``target`` with these figures."""
        device = replace(
            target.device, name=self.gpu, bandwidth=self.bandwidth, flops={**target.flops, **self.flops}
        )
        return target.on(device)

    def record(self) -> dict[str, Any]:
        """For a result's JSON."""
        return asdict(self)

    def line(self) -> str:
        """The figures as a line of text."""
        moved = " ".join(
            f"{name} {rate / 1e12:.2f}" for name, rate in (("copy", self.copy), ("reads", self.reads)) if rate
        )
        products = " ".join(f"{name} {rate / 1e12:.0f}" for name, rate in self.flops.items())
        return f"floors by {self.gpu}: TB/s {moved}; TFLOP/s {products} ({self.source})"


@cache
def present() -> Rates:
    """Of GPU 0, measured once in this process; needs 3 GiB of its memory.

    Raises:
        PlanError: there is no GPU.
    """
    driver = Driver()
    driver.initialise()
    return measure(driver)


def measure(driver: Driver) -> Rates:
    """Of the first GPU that ``driver`` sees; everything is given back.

    Raises:
        PlanError: plans cannot be made for it.
    """
    device = driver.open(0)
    try:
        target = _target(device)
        copy, reads = _copy(driver), None
        flops: dict[str, float] = {}
        try:
            reads = _reads(driver, target)
            flops["bfloat16"] = _products(driver, target, "bfloat16")
            eight = FP8 if "fp8" in target.features else INT8
            flops[eight] = _products(driver, target, eight)
            # By the data sheets both have one rate where there are both.
            flops[INT8] = flops[eight]
            source = "measured"
        except (ModuleNotFoundError, PlanError) as error:
            known = device_named(device.name)
            flops = dict((known or target.device).flops)
            source = f"rates are those of {(known or target.device).name}, since {error}"
    finally:
        driver.release(device)
    return _rates(device.name, copy, reads, flops, source)


def of_device(figures: Figures) -> Rates:
    """What is written down of a device."""
    return Rates(figures.name, None, None, figures.bandwidth, dict(figures.flops), "graphs/plan/devices.py")


def _rates(gpu: str, copy: float, reads: float | None, flops: dict[str, float], source: str) -> Rates:
    wide = flops["bfloat16"]
    # fp32 runs on the ordinary cores: see graphs/plan/devices.py.
    flops = {"float32": wide / 12, "float16": wide, **flops}
    return Rates(gpu, copy, reads, max(copy, reads or 0.0), flops, source)


def _target(device: Device) -> Target:
    major, minor = device.capability
    for target in TARGETS.values():
        if target.arch == 10 * major + minor:
            return target
    raise PlanError(
        f"{device.name} has compute capability {major}.{minor}, for which there are no plans and no floors"
    )


def _copy(driver: Driver) -> float:
    with ExitStack() as undo:
        places = []
        for _ in range(2):
            places.append(driver.allocate(COPIED))
            undo.callback(driver.free, places[-1])
        stream = driver.stream()
        undo.callback(driver.destroy_stream, stream)
        undo.callback(driver.synchronize, stream)
        source, target = places
        driver.fill(source, 1, COPIED, stream)
        took = _seconds(driver, lambda: driver.copy(target, source, COPIED, stream), stream)
    return 2 * COPIED / took


def _reads(driver: Driver, target: Target) -> float:
    """One row times many weights: a product that does nothing but read them."""
    product = Product(1, COPIED // 2 // SIDE, SIDE)
    return product.weight_bytes / _fastest(driver, target, product)


def _products(driver: Driver, target: Target, dtype: str) -> float:
    product = Product(SIDE, SIDE, SIDE, dtype)
    return product.operations / _fastest(driver, target, product)


def _fastest(driver: Driver, target: Target, product: Product) -> float:
    """Seconds of the fastest way to run a product."""
    built = products.build(product, target, keep=KEPT)
    stream = driver.stream()
    try:
        with products.loaded(driver, product, built, stream) as ways:
            return min(_seconds(driver, way, stream) for way in ways)
    finally:
        driver.destroy_stream(stream)


def _seconds(driver: Driver, run: Callable[[], object], stream: Any) -> float:
    """Least seconds of one of many in a row."""
    start, end = driver.timer(), driver.timer()

    def timed(count: int) -> float:
        driver.record(start, stream)
        for _ in range(count):
            run()
        driver.record(end, stream)
        driver.wait(end)
        return driver.seconds(start, end) / count

    try:
        timed(1)
        count = max(1, round(SECONDS / max(timed(1), 1e-9) + 0.5))
        return min(timed(min(count, 10_000)) for _ in range(REPEATS))
    finally:
        driver.destroy_event(start)
        driver.destroy_event(end)
