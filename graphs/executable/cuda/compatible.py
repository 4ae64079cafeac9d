"""Which GPUs and drivers run a plan's machine code."""

from __future__ import annotations

import re

from makeready.graphs.executable.cuda.driver import Device
from makeready.graphs.plan.plan import PlanError

# CUDA 12.3 brought graph nodes with edge data. Machine code runs on any driver of the toolkit's major version
# that knows the architecture: Blackwell's came with 12.8, its second generation's with 12.9.
_LEAST_CUDA = 12030
_LEAST_CUDA_FOR = {"sm_100a": 12080, "sm_120a": 12080, "sm_103a": 12090}


def capability(target: str) -> tuple[int, int]:
    """Compute capability of a target such as ``sm_90a``."""
    match = re.fullmatch(r"sm_(\d+)(\d)a?", target)
    if match is None:
        raise PlanError(f"the plan is for target {target}, this backend runs sm_80, sm_90a and the like")
    return int(match[1]), int(match[2])


def check_version(target: str, version: int) -> None:
    least = _LEAST_CUDA_FOR.get(target, _LEAST_CUDA)
    if version < least:
        raise PlanError(
            f"the NVIDIA driver supports CUDA {_dotted(version)}, a plan for {target} needs {_dotted(least)}; "
            "update the driver"
        )


def check_capability(target: str, made_for: tuple[int, int], device: Device) -> None:
    found = device.capability
    # Code with architecture-specific features (…a) runs on that very capability, other code on later minors.
    fits = found == made_for if target.endswith("a") else found[0] == made_for[0] and found >= made_for
    if not fits:
        wanted = f"{made_for[0]}.{made_for[1]}" + ("" if target.endswith("a") else " or a later minor")
        raise PlanError(
            f"the plan is for target {target} (compute capability {wanted}), GPU {device.ordinal} is "
            f"{device.name} with {found[0]}.{found[1]}; compile a plan for it"
        )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
