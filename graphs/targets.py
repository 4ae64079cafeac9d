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
        row_counts: how many row counts extend buckets differ in. One on a GPU: beside 1,024 tokens of an 8B
            model the logits of 255 padding rows cost under 1 %, a bucket that is 10 % too long 10 %.
        arch: CUDA compute capability times ten; 0 for the CPU.
        multiprocessors: of the GPU.
        shared_bytes: shared memory that one block can have.
        features: what kernels may ask for: ``tma`` (bulk tensor copies), ``wgmma``, ``pdl`` (programmatic
            dependent launch), ``fp8`` (matrix instructions).
    """

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    launch_seconds: float
    activation_dtype: str
    page_size: int
    max_tokens: int
    row_counts: int = 3
    arch: int = 0
    multiprocessors: int = 0
    shared_bytes: int = 0
    features: frozenset[str] = frozenset()

    @property
    def is_cuda(self) -> bool:
        """Whether plans for it hold compiled kernels."""
        return self.arch > 0

    def rate(self, dtype: str) -> float:
        """Multiply-add rate of ``dtype``, operations a second.

        Raises:
            PlanError: it is not known.
        """
        if dtype not in self.flops:
            raise PlanError(
                f"the cost model of {self.name} knows no rate for {dtype}, only for {', '.join(self.flops)}; "
                "add it to graphs/targets.py"
            )
        return self.flops[dtype]


# Two AVX2 cores: 20 GB/s and 150 GFLOP/s were seen with fp16-packed weights, 15 µs an op through PyTorch.
# 8-bit floats are widened to fp32 and multiplied as that.
_CPU = Target(
    name="cpu",
    bandwidth=20e9,
    flops={"float32": 100e9, "bfloat16": 150e9, "float16": 150e9, "float8_e4m3fn": 100e9},
    launch_seconds=15e-6,
    activation_dtype="float32",
    page_size=16,
    max_tokens=512,
)


def _cuda(
    arch: int, features: str, bandwidth: float, bf16: float, fp8: float, multiprocessors: int, shared: int
) -> Target:
    """A CUDA target; rates in 1e12 bytes or operations a second, shared memory in KiB.

    fp32 is set to a twelfth of bf16: about what the ordinary cores do, and only sampling runs there.
    """
    flops = {"float32": bf16 / 12, "bfloat16": bf16, "float16": bf16, "float8_e4m3fn": fp8}
    return Target(
        name=f"sm_{arch}a" if arch >= 90 else f"sm_{arch}",
        bandwidth=bandwidth * 1e12,
        flops={dtype: rate * 1e12 for dtype, rate in flops.items()},
        launch_seconds=2e-6,
        activation_dtype="bfloat16",
        page_size=64,
        max_tokens=8192,
        row_counts=1,
        arch=arch,
        multiprocessors=multiprocessors,
        shared_bytes=shared * 1024,
        features=frozenset(features.split()),
    )


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        _CPU,
        # Plans have run on the H100 alone. For the others kernels compile and fit, by models fitted to the H100,
        # and nobody has seen them run.
        # A100 80GB SXM. Data sheet: 2.04 TB/s, 312 TFLOP/s; fp8 weights would be widened to bf16.
        _cuda(80, "", 1.75, 265, 265, 108, 163),
        # H100 80GB SXM, measured: a device copy, and cuBLAS at 8192x8192x8192.
        _cuda(90, "tma wgmma pdl fp8", 3.0, 779, 1402, 132, 227),
        # B200. Data sheet: 8 TB/s, 2.25 and 4.5 PFLOP/s dense; scaled as the H100's measurements are.
        _cuda(100, "tma pdl fp8", 7.2, 1770, 3540, 148, 227),
        # RTX PRO 6000 Blackwell. Data sheet: 1.79 TB/s, 0.5 and 1 PFLOP/s dense; scaled likewise.
        _cuda(120, "tma pdl fp8", 1.6, 395, 790, 188, 99),
    )
}


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        PlanError: there is none.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise PlanError(f"target {name!r} is not built yet; targets are {', '.join(TARGETS)}") from None
