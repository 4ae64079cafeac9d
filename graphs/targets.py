"""Machines that plans are made for: the figures that cost models and rooflines use.

They steer choices (which buckets, which kernels) and never correctness. A target's name goes into the
plan, so a plan for one target refuses to load on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from makeready.graphs.plan import PlanError


@dataclass(frozen=True)
class Target:
    """Roofline of a machine.

    Attributes:
        bandwidth: bytes a second between memory and the cores.
        flops: dense multiply-add rate by the dtype of the weights, operations a second.
        launch_seconds: what a kernel costs before it does anything.
        activation_dtype: what flows between kernels unless the plan says otherwise.
        page_size: tokens of a KV page unless the plan says otherwise.
        max_tokens: tokens of one step unless the plan says otherwise.
    """

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    launch_seconds: float
    activation_dtype: str
    page_size: int
    max_tokens: int


# Two AVX2 cores: 20 GB/s and 150 GFLOP/s were seen with fp16-packed weights, 15 µs an op through PyTorch.
_CPU = Target(
    name="cpu",
    bandwidth=20e9,
    flops={"float32": 100e9, "bfloat16": 150e9, "float16": 150e9},
    launch_seconds=15e-6,
    activation_dtype="float32",
    page_size=16,
    max_tokens=512,
)

TARGETS: Mapping[str, Target] = {target.name: target for target in (_CPU,)}


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        PlanError: there is none.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise PlanError(f"target {name!r} is not built yet; targets are {', '.join(TARGETS)}") from None
