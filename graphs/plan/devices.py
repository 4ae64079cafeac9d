"""Devices that plans are chosen for: figures that steer choices and floors, and never what is computed.

A plan is made for an architecture (graphs/plan/targets.py), which says where it runs, and chosen for one of the
architecture's devices: which kernels and which batch shapes are fast depends on bandwidth and rates. It runs on
every device of the architecture that has the memory, known here or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from makeready.graphs.plan.plan import Plan, PlanError


@dataclass(frozen=True)
class Device:
    """What a device can sustain.

    Attributes:
        name: as ``device=`` takes it.
        target: its architecture, a name of graphs/plan/targets.py.
        bandwidth: bytes a second between memory and the cores, of reads alone where that was measured, else of
            a copy.
        flops: dense multiply-add rate by the dtype of the weights, operations a second.
        multiprocessors: how many; 0 for the CPU.
        memory: bytes, by the data sheet; 0 where it is the machine's.
        pattern: what the driver calls it, as a regular expression over the whole name.
    """

    name: str
    target: str
    bandwidth: float
    flops: Mapping[str, float]
    multiprocessors: int = 0
    memory: int = 0
    pattern: str = ""


def _gpu(
    name: str, target: str, pattern: str, figures: tuple[float, float, float, int, int], int8: float = 0.0
) -> Device:
    """A GPU by its bandwidth, rates of bf16 and of FP8, multiprocessors and memory; ``int8``: FP8's where it is 0.

    Bandwidth and rates are in 1e12 bytes or operations a second, memory in 1e9 bytes.

    fp32 is set to a twelfth of bf16: about what the ordinary cores do, and only sampling runs there.
    """
    bandwidth, bf16, fp8, multiprocessors, memory = figures
    rates = {"float32": bf16 / 12, "bfloat16": bf16, "float16": bf16, "float8_e4m3fn": fp8}
    rates["int8"] = int8 or fp8
    return Device(
        name=name,
        target=target,
        bandwidth=bandwidth * 1e12,
        flops={dtype: rate * 1e12 for dtype, rate in rates.items()},
        multiprocessors=multiprocessors,
        memory=memory * 10**9,
        pattern=pattern,
    )


# The first device of a target is the one that plans are chosen for unless told otherwise. The H200 and the H100
# SXM were measured; the others are their data sheets' figures times what the H100 reaches of its own: 0.90 of
# the bandwidth, 0.79 of dense bf16 and 0.71 of FP8 (Hopper and Ampere) or 0.79 (Blackwell, for which FP8 was
# scaled as bf16 is). The H20's matrix units are cut so far that power does not slow them: 0.95.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        # Two AVX2 cores: 20 GB/s and 150 GFLOP/s were seen with fp16-packed weights.
        Device(
            "cpu",
            "cpu",
            20e9,
            # 8-bit floats are widened to fp32 and multiplied as that.
            {
                "float32": 100e9, "bfloat16": 150e9, "float16": 150e9, "float8_e4m3fn": 100e9,
                "uint8": 300e9, "int8": 300e9,
            },
        ),
        # 2.04 TB/s, 312 TFLOP/s, 624 TOP/s in int8; 8-bit floats would be widened to bf16.
        _gpu("a100", "sm_80", r"NVIDIA A100.*80GB.*", (1.75, 265, 265, 108, 80), 440),
        # 1.56 TB/s.
        _gpu("a100_40gb", "sm_80", r"NVIDIA A100.*40GB.*", (1.35, 265, 265, 108, 40), 440),
        # Measured: 4.3 TB/s of a copy, 4.5 of reads alone; cuBLAS at 8192x8192x8192.
        _gpu("h200", "sm_90a", r"NVIDIA H200( NVL)?", (4.5, 790, 1450, 132, 141)),
        # SXM, measured: a copy, and cuBLAS at 8192x8192x8192. The H800 differs in its links.
        _gpu("h100", "sm_90a", r"NVIDIA H[18]00 80GB HBM3", (3.0, 779, 1402, 132, 80)),
        # 3.94 TB/s, 835 and 1,670 TFLOP/s.
        _gpu("h100_nvl", "sm_90a", r"NVIDIA H100 NVL", (3.5, 660, 1185, 132, 94)),
        # 2.04 TB/s, 756 and 1,513 TFLOP/s.
        _gpu("h100_pcie", "sm_90a", r"NVIDIA H[18]00 PCIe", (1.8, 597, 1074, 114, 80)),
        # 4.0 TB/s, 148 and 296 TFLOP/s; the H20-3e has 141 GB at 4.8 TB/s.
        _gpu("h20", "sm_90a", r"NVIDIA H20", (3.6, 140, 280, 78, 96)),
        _gpu("h20_3e", "sm_90a", r"NVIDIA H20-?3e", (4.3, 140, 280, 78, 141)),
        # 4.0 TB/s; rates are the H100's.
        _gpu("gh200", "sm_90a", r"NVIDIA GH200.*", (3.6, 779, 1402, 132, 96)),
        # 8 TB/s, 2.25 and 4.5 PFLOP/s.
        _gpu("b200", "sm_100a", r"NVIDIA B200", (7.2, 1770, 3540, 148, 192)),
        # 1.79 TB/s, 0.5 and 1 PFLOP/s.
        _gpu("rtx_pro_6000", "sm_120a", r"NVIDIA RTX PRO 6000 Blackwell.*", (1.6, 395, 790, 188, 96)),
        # 1.79 TB/s, 210 and 419 TFLOP/s with sums in fp32, 838 TOP/s in int8.
        _gpu("rtx_5090", "sm_120a", r"NVIDIA GeForce RTX 5090", (1.6, 165, 331, 170, 32), 662),
    )
}  # fmt: skip


def devices_of(target: str) -> list[Device]:
    """The devices of a target, its default first."""
    return [device for device in DEVICES.values() if device.target == target]


def find_device(target: str, name: str | None) -> Device:
    """The device called ``name``; None is the target's default.

    Raises:
        PlanError: the target has no such device.
    """
    known = devices_of(target)
    for device in known:
        if name is None or device.name == name:
            return device
    elsewhere = DEVICES.get(str(name))
    hint = f"; {name} is a device of target={elsewhere.target}" if elsewhere else ""
    raise PlanError(
        f"device={name} is not known for target {target}; its devices are "
        f"{', '.join(device.name for device in known)}{hint}"
    )


def device_named(gpu: str) -> Device | None:
    """The device that the driver calls ``gpu``; None where its figures are not known, which is no error."""
    for device in DEVICES.values():
        if device.pattern and re.fullmatch(device.pattern, gpu):
            return device
    return None


def chosen_for_another(plan: Plan, gpu: str) -> str | None:
    """A sentence where ``plan`` runs on another device than it was chosen for; None where it does not.

    Args:
        gpu: what the driver calls the device that it runs on.
    """
    found = device_named(gpu)
    if not plan.device or (found is not None and found.name == plan.device):
        return None
    if found is None:
        return (
            f"the plan was chosen for device {plan.device} and runs on {gpu}, whose figures are not known here: "
            "its results are the same, its kernels may not be the fastest"
        )
    return (
        f"the plan was chosen for device {plan.device} and runs on {gpu}: its results are the same, its kernels "
        f"may not be the fastest; compile it with device={found.name}"
    )
