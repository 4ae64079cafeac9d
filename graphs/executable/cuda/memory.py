"""Device memory by the plan's arithmetic, and the address of every value that a launch may name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from makeready.graphs.executable.cuda.driver import Device, Driver
from makeready.graphs.executable.load import asked_pages
from makeready.graphs.inspect.split import beside_pages
from makeready.graphs.plan import memory
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.spec import LEAST_PAGES, Bucket, KVPart
from makeready.kernels.spec import DTYPE_BYTES, PAGES

# What the driver takes beside our allocations, a bound over what was seen on an H100 with driver 580:
# 0.6 MiB a graph of 400 nodes, and kernels' code, pinned staging and copies' bookkeeping.
RESERVED = 192 * 2**20
RESERVED_PER_GRAPH = 2 * 2**20


@dataclass(frozen=True)
class Regions:
    """Addresses of the plan's regions, one allocation each; step and result are the io region's two parts."""

    weights: int
    arena: int
    io: int
    slot: int
    scratch: int
    kv: int
    result: int

    @property
    def step(self) -> int:
        """Address of the step fields."""
        return self.io

    @property
    def allocations(self) -> tuple[int, ...]:
        """What was allocated."""
        return self.weights, self.arena, self.io, self.slot, self.scratch, self.kv


@dataclass(frozen=True)
class KVMemory:
    """Where the number of KV pages comes from, all but ``pages`` in bytes.

    Attributes:
        pages: KV pages, the null page included.
        free: what the device had free when the plan was loaded.
        fixed: the plan's weights and buffers.
        reserve: left to the driver: graphs, kernels' code, pinned staging.
        page: of one page.
        asked: memory for pages that was asked for; None takes all that is left.
    """

    pages: int
    free: int
    fixed: int
    reserve: int
    page: int
    asked: int | None

    def sentence(self, plan: Plan) -> str:
        """The figure and the arithmetic that leads to it."""
        left = self.free - self.fixed - self.reserve
        size, row = plan.limits.page_size, plan.limits.pages_per_row
        pages = self.pages - 1
        asked = "" if self.asked is None else f", of which kv.memory_gib takes {_gib(self.asked)}"
        return (
            f"KV cache: {_gib(self.free)} GiB free - {_gib(self.fixed)} for weights and buffers - "
            f"{_gib(self.reserve)} reserve for the driver = {_gib(left)} GiB{asked}: "
            f"{_states(plan, self.pages)}{pages:,} pages of {size} tokens, {pages * size:,} tokens or "
            f"{pages / row:.1f} rows of full context"
        )


def kv_memory(plan: Plan, free: int, kv_bytes: int | None) -> KVMemory:
    """KV pages to allocate.

    Args:
        free: bytes that the device has free.
        kv_bytes: memory for pages; None takes all that is left beside the plan's own memory and a reserve for the
            driver. Pages beyond what rows of full context need keep prefixes for later requests.

    Raises:
        PlanError: the memory is too little for the plan, two pages, or what was asked for.
    """
    # Each part of the cache begins at an aligned address.
    reserved = RESERVED + RESERVED_PER_GRAPH * len(plan.buckets) + memory.ALIGNMENT * len(plan.kv.parts)
    page, fixed = plan.kv.page_bytes, plan.memory.fixed
    wanted = LEAST_PAGES if kv_bytes is None else asked_pages(plan, kv_bytes)
    needed = fixed + reserved + plan.kv.nbytes(wanted, plan.limits)
    if free < needed:
        raise PlanError(
            f"the GPU has {_gib(free)} GiB free, and {_gib(needed)} GiB are needed: {_gib(fixed)} for weights and "
            f"buffers, {_gib(reserved)} for the driver, {_states(plan, wanted)}and {_gib(wanted * page)} for KV "
            "pages; free memory, lower kv.memory_gib or compile with fewer tokens or smaller weights"
        )
    pages = wanted if kv_bytes is not None else plan.pages_in(free - reserved)
    return KVMemory(pages, free, fixed, reserved, page, kv_bytes)


def kv_offsets(plan: Plan, pages: int) -> tuple[dict[str, int], int]:
    """Byte offset of each part of the cache in the KV region, and the bytes of all."""
    offsets, end = {}, 0
    for part, nbytes in part_bytes(plan, pages):
        offsets[part.name] = end
        end += memory.align(nbytes)
    return offsets, end


def part_bytes(plan: Plan, pages: int) -> list[tuple[KVPart, int]]:
    """The tensors of the cache and their bytes."""
    blocks = plan.kv.blocks(pages, plan.limits)
    return [(part, part.spec.nbytes({PAGES: blocks[g.name]})) for g in plan.kv.groups for part in g.parts]


def allocate(driver: Driver, plan: Plan, pages: int) -> Regions:
    """One allocation for each region, with undefined content.

    Raises:
        PlanError: the device has not that much in one piece; nothing stays allocated.
    """
    sizes = plan.memory
    step = memory.align(sizes.step)
    wanted = {
        "weights": sizes.weights,
        "arena": sizes.arena,
        "io": step + sizes.result,
        "slot": sizes.slot,
        "scratch": sizes.scratch,
        "kv": kv_offsets(plan, pages)[1],
    }
    made: dict[str, int] = {}
    try:
        for name, nbytes in wanted.items():
            made[name] = driver.allocate(nbytes)
    except Exception as error:
        release(driver, made.values())
        raise PlanError(f"no memory for the plan's {_gib(sum(wanted.values()))} GiB: {error}") from None
    return Regions(**made, result=made["io"] + step)


def release(driver: Driver, addresses: Iterable[int]) -> None:
    """Free allocations, all of them even where the driver refuses one."""
    with ExitStack() as all_of_them:
        for address in addresses:
            all_of_them.callback(driver.free, address)


def lasting_addresses(plan: Plan, regions: Regions, pages: int) -> dict[str, int]:
    """Addresses of the values that are in the same place for every bucket: weights, slots, cache."""
    named = {w.param.name: regions.weights + w.offset for w in plan.weights}
    offsets, _ = memory.layout(plan.slots, {})
    named |= {name: regions.slot + offset for name, offset in offsets.items()}
    return named | {name: regions.kv + offset for name, offset in kv_offsets(plan, pages)[0].items()}


def bucket_addresses(
    plan: Plan, regions: Regions, lasting: Mapping[str, int], bucket: Bucket
) -> dict[str, int]:
    """Address of every value that launches in ``bucket`` may name."""
    named = dict(lasting)
    step = plan.steps[bucket.phase]
    for base, fields in ((regions.step, step.staged), (regions.result, step.results)):
        offsets, _ = memory.layout(fields, bucket.sizes)
        named |= {name: base + offset for name, offset in offsets.items()}
    buffers = plan.programs[bucket.phase].buffers
    return named | {name: regions.arena + buffer.offset for name, buffer in buffers.items()}


def _states(plan: Plan, pages: int) -> str:
    beside = beside_pages(plan, pages)
    return f"{beside}, " if beside else ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}"


_RANDOM_BYTES = 32 << 20
# Bits that are drawn (sign and mantissa) and bits that are set (exponents of 0.5 and 1), by dtype.
_RANDOM_BITS = {
    "float32": (0x80FFFFFF, 0x3F000000),
    "bfloat16": (0x80FF, 0x3F00),
    "float16": (0x87FF, 0x3800),
    "float8_e4m3fn": (0x8F, 0x30),
    "int8": (0xFF, 0),  # any number
    "uint8": (0xFF, 0),
}


def fill_random(
    driver: Driver, device: Device, plan: Plan, addresses: Mapping[str, int], pages: int, seed: int
) -> None:
    """Random numbers of magnitude 0.5 to 2 in all of the cache; waits until they are there. Sequences go on to begin
    with zeros, where they have states."""
    driver.use(device)
    stream = driver.stream()
    for part, nbytes in part_bytes(plan, pages):
        random_numbers(driver, addresses[part.name], nbytes, part.spec.dtype, stream, seed)
    for part in (part for group in plan.kv.states for part in group.parts):
        driver.fill(addresses[part.name], 0, part.page_bytes, stream)
    driver.synchronize(stream)
    driver.destroy_stream(stream)


def random_numbers(driver: Driver, address: int, nbytes: int, dtype: str, stream: Any, seed: int = 0) -> None:
    """Random numbers of magnitude 0.5 to 2 from ``address`` on, the same again after 32 MiB; waits for them."""
    drawn, fixed = _RANDOM_BITS[dtype]
    width = np.dtype(f"u{DTYPE_BYTES[dtype]}")
    size = min(nbytes, _RANDOM_BYTES)
    bits = np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(width)
    bits &= width.type(drawn)
    bits |= width.type(fixed)
    driver.to_device(address, bits.ctypes.data, size, stream)
    for start in range(size, nbytes, size):  # a cache may take all of the memory
        driver.copy(address + start, address, min(size, nbytes - start), stream)
    driver.synchronize(stream)
