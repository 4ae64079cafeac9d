"""Architectures that plans are made for: where a plan runs, and what its kernels may use.

A target's name goes into the plan, so a plan for one target refuses to load on another. What steers choices
alone (bandwidth, rates, multiprocessors) is its device's: graphs/plan/devices.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from makeready.graphs.plan.devices import DEVICES, Device, find_device
from makeready.graphs.plan.plan import Plan, PlanError


@dataclass(frozen=True)
class Target:
    """An architecture, and the device of it that choices are made for.

    Attributes:
        device: whose figures cost models and rooflines use.
        launch_seconds: what a kernel costs before it does anything.
        activation_dtype: what flows between kernels unless the plan says otherwise.
        page_size: tokens of a KV page unless the plan says otherwise.
        max_tokens: tokens of one step unless the plan says otherwise.
        row_counts: how many row counts extend buckets differ in. One on a GPU: beside 1,024 tokens of an 8B
            model the logits of 255 padding rows cost under 1 %, a bucket that is 10 % too long 10 %.
        arch: CUDA compute capability times ten; 0 for the CPU.
        shared_bytes: shared memory that one block can have.
        features: what kernels may ask for: ``tma`` (bulk tensor copies), ``wgmma``, ``pdl`` (programmatic
            dependent launch), ``fp8`` (matrix instructions).
    """

    name: str
    device: Device
    launch_seconds: float
    activation_dtype: str
    page_size: int
    max_tokens: int
    row_counts: int = 3
    arch: int = 0
    shared_bytes: int = 0
    features: frozenset[str] = frozenset()

    @property
    def is_cuda(self) -> bool:
        """Whether plans for it hold compiled kernels."""
        return self.arch > 0

    @property
    def bandwidth(self) -> float:
        """The device's, in bytes a second."""
        return self.device.bandwidth

    @property
    def flops(self) -> Mapping[str, float]:
        """The device's rates by dtype, in operations a second."""
        return self.device.flops

    @property
    def multiprocessors(self) -> int:
        """The device's."""
        return self.device.multiprocessors

    def on(self, device: Device) -> Target:
        """The same architecture with another device's figures."""
        return replace(self, device=device)

    def rate(self, dtype: str) -> float:
        """Multiply-add rate of ``dtype``, operations a second.

        Raises:
            PlanError: it is not known.
        """
        if dtype not in self.flops:
            raise PlanError(
                f"the cost model of {self.device.name} knows no rate for {dtype}, only for {', '.join(self.flops)}; "
                "add it to graphs/plan/devices.py"
            )
        return self.flops[dtype]


_CPU = Target(
    name="cpu",
    device=find_device("cpu", None),
    launch_seconds=15e-6,  # an op through PyTorch
    activation_dtype="float32",
    page_size=16,
    max_tokens=512,
)


def _cuda(arch: int, features: str, shared: int) -> Target:
    """A CUDA target on its default device; shared memory in KiB."""
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    return Target(
        name=name,
        device=find_device(name, None),
        launch_seconds=2e-6,
        activation_dtype="bfloat16",
        page_size=64,
        max_tokens=8192,
        row_counts=1,
        arch=arch,
        shared_bytes=shared * 1024,
        features=frozenset(features.split()),
    )


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _CPU,
        # Plans have run on Hopper alone. For the others kernels compile and fit, by models fitted to the H100,
        # and nobody has seen them run.
        _cuda(80, "", 163),  # Ampere
        _cuda(90, "tma wgmma pdl fp8", 227),  # Hopper
        _cuda(100, "tma pdl fp8", 227),  # Blackwell
        _cuda(120, "tma pdl fp8", 99),  # Blackwell with GDDR
    )
}


def find_target(name: str, device: str | None = None) -> Target:
    """The target called ``name``, on the device that choices are made for; None is the target's default.

    Raises:
        PlanError: there is no such target, or it has no such device.
    """
    if name not in TARGETS:
        raise PlanError(f"target {name!r} is not built yet; targets are {', '.join(TARGETS)}")
    return TARGETS[name].on(find_device(name, device))


def target_of(plan: Plan) -> Target:
    """The target and device of a plan; the default device where the plan's is not known here.

    Raises:
        PlanError: the target is unknown.
    """
    target = find_target(plan.target)
    known = DEVICES.get(plan.device)
    return target.on(known) if known is not None and known.target == plan.target else target
