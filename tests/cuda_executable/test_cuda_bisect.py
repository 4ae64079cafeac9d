"""The CUDA executable beside the interpreter, on a fake GPU that computes; one of its kernels may be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_driver import Change, Emulator
from fake_driver import FakeBindings
from plans import dummy, make_plan, tiny

from makeready.graphs.executable.bisect import Found, as_references, bisect, pages_needed
from makeready.graphs.executable.cpu.executable import CpuExecutable
from makeready.graphs.executable.cuda.driver import Driver
from makeready.graphs.executable.cuda.executable import CudaExecutable
from makeready.graphs.plan.plan import Plan

PROMPT = [(11 * i) % 96 for i in range(1, 40)]


def compare(plan: Plan, change: Change, rows: int = 1) -> Found:
    pages = pages_needed(plan, len(PROMPT), 3, rows)
    bindings, checkpoint = FakeBindings(), dummy()
    device = CudaExecutable(plan, checkpoint, kv_bytes=pages * plan.kv.page_bytes, driver=Driver(bindings))
    bindings.on_launch = Emulator(device, change)
    reference = CpuExecutable(as_references(plan), checkpoint, pages=pages, interpret=True)
    found = bisect(device, reference, PROMPT, 3, rows=rows)
    device.close()
    bindings.check_released()
    return found


@pytest.mark.parametrize("fields", [{}, {"disabled_passes": ("fuse_qkv", "fuse_silu_mul")}])
def test_a_sound_device_does_not_differ(fields: dict[str, Any]) -> None:
    plan = make_plan(**fields) if fields else tiny()
    ran = []
    found = compare(plan, lambda bucket, at, named: ran.append((bucket, at)), rows=2)
    assert found.difference is None
    assert found.nearest == 0  # the references themselves
    assert len(found.tokens) == 3
    assert len(ran) == 2 * found.launches, "one by one, and as a whole"


@pytest.mark.parametrize(("phase", "op", "nth"), [("extend", "rms_norm", 0), ("decode", "linear", 5)])
def test_the_planted_fault_is_named(phase: str, op: str, nth: int) -> None:
    launches = tiny().programs[phase].launches
    at = [i for i, launch in enumerate(launches) if launch.op == op][nth]

    def change(bucket: Any, place: int, named: dict[str, torch.Tensor]) -> None:
        if (bucket.phase, place) == (phase, at):
            named["y"][0] *= 1.05

    difference = compare(tiny(), change).difference
    assert difference is not None
    assert (difference.bucket.phase, difference.at, difference.name) == (phase, at, "y")
    assert (difference.what, difference.row) == ("result", 0)
    assert difference.step == (0 if phase == "extend" else 2)
    assert f"launch {at + 1} of {len(launches)}: {op}" in difference.sentence(tiny())
