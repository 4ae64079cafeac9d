"""What passes between host and GPU around a step: two pinned buffers, so that one is filled while the GPU
reads the other, and the slot table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from makeready.graphs.executable.cuda.driver import Driver, host_bytes
from makeready.graphs.plan import memory
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.spec import HOST, Bucket, Field

Arrays = Mapping[str, np.ndarray]

_MOST_SENT = 32 << 10  # bytes of one copy out of memory that is not pinned


class Flight:
    """A pinned buffer for a step's fields and results, and the event after which both are free again."""

    def __init__(self, driver: Driver, plan: Plan) -> None:
        self._driver = driver
        self._steps = plan.steps
        self._step = memory.align(plan.memory.step)
        self.step = driver.allocate_host(self._step + plan.memory.result)
        self.result = self.step + self._step
        self.event = driver.event()
        self.early_event = driver.event()
        self._views: dict[Bucket, tuple[Arrays, Arrays, int, int]] = {}
        self._pending: PendingStep | None = None

    def take(self, bucket: Bucket, step: Arrays) -> tuple[int, int]:
        """Fill in a step once the one before has left; returns the bytes of its fields and of its results."""
        if self._pending is not None:
            self._pending.collect()
        inputs, results, step_bytes, result_bytes = self._view(bucket)
        for name, place in inputs.items():
            given = step[name]
            assert given.shape == place.shape, f"{name} is {given.shape}, {bucket} has {place.shape}"
            place[...] = given
        early = {name: results[name] for name in self._steps[bucket.phase].early}
        self._pending = PendingStep(self._driver, self.event, results, self.early_event, early)
        return step_bytes, result_bytes

    def bring_early(self, bucket: Bucket, results: int, stream: Any) -> None:
        """Behind the launches that write them, a step's early results go to the host.

        Args:
            results: address of the step's results on the device.
        """
        kind = self._steps[bucket.phase]
        offsets, _ = memory.layout(kind.results, bucket.sizes)
        for field in kind.results:
            if field.name in kind.early:
                at, nbytes = offsets[field.name], field.spec.nbytes(bucket.sizes)
                self._driver.to_host(self.result + at, results + at, nbytes, stream)
        self._driver.record(self.early_event, stream)

    @property
    def pending(self) -> PendingStep:
        """The step that was taken last."""
        assert self._pending is not None, "no step was launched"
        return self._pending

    def close(self) -> None:
        """Free buffer and event; nothing may be under way. Results that were not read are lost."""
        if self._pending is not None:
            self._pending.drop()
        self._views.clear()
        try:
            self._driver.free_host(self.step)
        finally:
            self._driver.destroy_event(self.event)
            self._driver.destroy_event(self.early_event)

    def _view(self, bucket: Bucket) -> tuple[Arrays, Arrays, int, int]:
        found = self._views.get(bucket)
        if found is None:
            kind = self._steps[bucket.phase]
            inputs, step_bytes = _arrays(self.step, kind.staged, bucket.sizes)
            results, result_bytes = _arrays(self.result, kind.results, bucket.sizes)
            found = self._views[bucket] = (inputs, results, step_bytes, result_bytes)
        return found


class PendingStep:
    """A launched step. See :class:`makeready.graphs.executable.base.Pending`."""

    def __init__(self, driver: Driver, event: Any, results: Arrays, early_event: Any, early: Arrays) -> None:
        self._driver = driver
        self._event = event
        self._early_event = early_event
        self._early = early
        self._pinned: Arrays | None = results
        self._copied: Arrays = {}
        self._dropped = False

    def wait(self) -> Arrays:
        self.collect()
        if self._dropped:
            raise PlanError("the model was closed before this step's results were read")
        return self._copied

    def early(self) -> Arrays:
        assert self._pinned is not None, "the step is behind its cut"
        self._driver.wait(self._early_event)
        return {name: array.copy() for name, array in self._early.items()}

    def collect(self) -> None:
        """Wait for the results and copy them out of the pinned buffer, which is used again."""
        if self._pinned is not None:
            self._driver.wait(self._event)
            self._copied = {name: array.copy() for name, array in self._pinned.items()}
            self._pinned = None

    def drop(self) -> None:
        """Give up results that were not read: the pinned buffer goes away."""
        self._dropped = self._pinned is not None
        self._pinned = None


class SlotTable:
    """The slot fields on the device. Those that the host keeps have a copy here.

    Of these only fields whose bytes change are sent: a request differs from the slot's last one in a few numbers.
    What is sent is below the 64 KiB up to which the driver keeps its own copy.

    Args:
        address: of the slot region, whose content is undefined so far.
    """

    def __init__(self, driver: Driver, plan: Plan, address: int, stream: Any) -> None:
        self._driver = driver
        self._stream = stream
        offsets, _ = memory.layout(plan.slots, {})
        self._places = {name: address + offset for name, offset in offsets.items()}
        self._fields = {f.name: f for f in plan.slots}
        self._host = {
            f.name: np.full(f.spec.at({}), f.default, f.spec.dtype) for f in plan.slots if f.keeper == HOST
        }
        for name, field in self._fields.items():
            if name in self._host:
                array = self._host[name]
                driver.to_device(self._places[name], array.ctypes.data, array.nbytes, stream)
            else:
                driver.fill(self._places[name], 0, field.spec.nbytes({}), stream)
        driver.synchronize(stream)  # the copies above may be larger than what the driver keeps

    def write(self, slot: int, values: Mapping[str, Any]) -> None:
        """Set one slot's fields, in the stream's order; see :meth:`.base.Executable.write_slot`."""
        unknown = set(values) - set(self._places)
        assert not unknown, f"slots have no field {unknown}"
        for name, field in self._fields.items():
            if field.keeper == HOST:
                self._write(name, slot, _row(field, values.get(name)))
            elif name in values:
                self._send(field, slot, np.atleast_1d(np.asarray(values[name], field.spec.dtype)))

    def write_late(self, slot: int, values: Mapping[str, Any]) -> None:
        """Set beginnings of one slot's late fields alone, in the stream's order."""
        for name, value in values.items():
            self._send(self._fields[name], slot, np.asarray(value, self._fields[name].spec.dtype))

    def forget(self, slots: Iterable[int]) -> None:
        """What the device has of ``slots`` was overwritten with 0xFF: whatever is written next is sent."""
        for slot in slots:
            for table in self._host.values():
                table[slot : slot + 1].view(np.uint8)[...] = 0xFF

    def _send(self, field: Field, slot: int, entries: np.ndarray) -> None:
        """The first entries of what the device keeps for a slot: steps write there, so the host has no copy."""
        entries = np.ascontiguousarray(entries)
        start = self._places[field.name] + slot * (field.spec.nbytes({}) // field.spec.at({})[0])
        for at in range(0, entries.nbytes, _MOST_SENT):
            nbytes = min(_MOST_SENT, entries.nbytes - at)
            self._driver.to_device(start + at, entries.ctypes.data + at, nbytes, self._stream)

    def _write(self, name: str, slot: int, row: np.ndarray) -> None:
        table = self._host[name]
        if table[slot].tobytes() == row.tobytes():
            return
        table[slot] = row
        at = slot * row.nbytes
        self._driver.to_device(self._places[name] + at, table.ctypes.data + at, row.nbytes, self._stream)


def _row(field: Field, value: Any) -> np.ndarray:
    """One slot's entry of a field: what is given, then defaults."""
    made = np.full(field.spec.at({})[1:], field.default, field.spec.dtype)
    if value is not None and made.ndim:
        made[: len(value)] = value
    elif value is not None:
        made[...] = value
    return made


def _arrays(
    address: int, fields: tuple[Field, ...], sizes: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], int]:
    """Fields at ``address`` as arrays, and their bytes."""
    offsets, nbytes = memory.layout(fields, sizes)
    region = host_bytes(address, nbytes)
    made = {}
    for field in fields:
        start = offsets[field.name]
        part = region[start : start + field.spec.nbytes(sizes)]
        made[field.name] = part.view(field.spec.dtype).reshape(field.spec.at(sizes))
    return made, nbytes
