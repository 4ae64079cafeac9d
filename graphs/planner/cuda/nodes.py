"""From a way to run a call to what a plan says of it: kernel nodes, their arguments, their machine code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from makeready.graphs.plan.memory import ALIGNMENT
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.program import APART, Binary, Node, NodeArgument, PlanCandidate
from makeready.graphs.planner.cuda.aot import Compiled, Kernel, MapLayout
from makeready.graphs.planner.cuda.offers import Offer
from makeready.kernels.device import Argument, Candidate, Descriptor, Pointer, Scalar, Scratch
from makeready.kernels.spec import DTYPE_BYTES

# What CUDA C++ states of a map, as numbers of CUtensorMapSwizzle (by bytes) and CUtensorMapDataType (by dtype).
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTIONS = {128: 2, 256: 3}
_ELEMENTS = {
    "float8_e4m3fn": 0,
    "int8": 0,
    "uint8": 0,
    "int16": 1,
    "int32": 3,
    "float16": 6,
    "float32": 7,
    "bfloat16": 9,
}


def binary_key(kernel: Kernel, made: Compiled) -> str:
    """Name of a binary: the function's, and a digest of the machine code and of how it is launched."""
    total = hashlib.sha256(made.cubin)
    total.update(f"{made.function} {made.warps} {made.shared}".encode())
    return f"{kernel.name}-{total.hexdigest()[:16]}"


def binary_of(made: Compiled) -> Binary:
    """What a plan says of a compiled kernel."""
    return Binary(
        function=made.function,
        sha256=hashlib.sha256(made.cubin).hexdigest(),
        warps=made.warps,
        shared=made.shared,
        registers=made.registers,
        spill_bytes=made.spill_bytes,
        dependent=made.waits,
        nbytes=len(made.cubin),
        null_pointers=made.null_pointers,
        cluster=made.cluster,
    )


def candidates_of(
    offers: Sequence[Offer],
    compiled: Mapping[Kernel, Compiled],
    keys: Mapping[Kernel, str],
    counters: int,
    *,
    apart: bool,
) -> tuple[PlanCandidate, ...]:
    """The candidates that a plan has of ``offers``; of a chain, if there are any, its launches ``apart`` come behind
    those that were timed.
    """
    made = [_planned(offer, compiled, keys, counters) for offer in offers]
    if made and apart:
        made.insert(sum(not offer.tuned_only for offer in offers), PlanCandidate(APART, ()))
    return tuple(made)


def _planned(
    offer: Offer, compiled: Mapping[Kernel, Compiled], keys: Mapping[Kernel, str], counters: int
) -> PlanCandidate:
    nodes = []
    for launch, kernel in zip(offer.candidate.launches, offer.kernels, strict=True):
        made = compiled[kernel]
        arguments = tuple(
            _argument(name, launch.arguments[name], offer, made, counters) for name in made.arguments
        )
        nodes.append(Node(keys[kernel], launch.grid, arguments, launch.dependent))
    return PlanCandidate(offer.name, tuple(nodes), round(1e9 * offer.candidate.seconds))


def _argument(name: str, argument: Argument, offer: Offer, made: Compiled, counters: int) -> NodeArgument:
    if isinstance(argument, Scalar):
        return NodeArgument("scalar", value=argument.value, dtype=argument.dtype)
    if isinstance(argument, Scratch):
        return NodeArgument("scratch", offset=_moved(argument.offset, offer, counters), dtype=argument.dtype)
    dtype = offer.call.tensors[argument.operand].dtype
    if isinstance(argument, Pointer):
        return NodeArgument("pointer", operand=argument.operand, dtype=dtype)
    kind, layout = "descriptor", made.maps.get(name)
    if layout is None:
        kind, layout = "map", stated_layout(argument, dtype)
    return NodeArgument(
        kind,
        operand=argument.operand,
        dtype=dtype,
        shape=tuple(d if isinstance(d, int) else str(d) for d in argument.shape),
        strides=argument.strides,
        block=layout.block,
        swizzle=layout.swizzle,
        element_type=layout.element_type,
        promotion=layout.promotion,
    )


def stated_layout(argument: Descriptor, dtype: str) -> MapLayout:
    """The layout of a map of CUDA C++, which its launch states.

    Raises:
        PlanError: the driver takes no such map.
    """
    inner = argument.block[-1] * DTYPE_BYTES[dtype]
    if argument.swizzle not in _SWIZZLES:
        raise PlanError(f"the map over {argument.operand} has no swizzle of {argument.swizzle} bytes")
    if (argument.swizzle and inner > argument.swizzle) or inner % 16 or max(argument.block) > 256:
        raise PlanError(
            f"the map over {argument.operand} cannot have a box of {argument.block} with rows of {inner} bytes: rows "
            "are multiples of 16 bytes, no longer than the swizzle, and no side is more than 256"
        )
    if any(s * DTYPE_BYTES[dtype] % 16 for s in argument.strides[:-1]) or argument.strides[-1] != 1:
        raise PlanError(f"the map over {argument.operand} has strides that are no multiples of 16 bytes")
    if argument.promotion not in _PROMOTIONS:
        raise PlanError(
            f"the map over {argument.operand} cannot bring {argument.promotion} bytes to L2 at once, but 128 or 256"
        )
    promotion = _PROMOTIONS[argument.promotion]
    return MapLayout(argument.block, _SWIZZLES[argument.swizzle], _ELEMENTS[dtype], promotion)


def _moved(offset: int, offer: Offer, counters: int) -> int:
    """Where the region has what a candidate calls ``offset``: its counters first, the rest behind everybody's.

    The rest moves by a multiple of :data:`ALIGNMENT`, so that alignment is what the candidate thinks it is.
    """
    if offset >= max(offer.candidate.scratch, offer.candidate.zeroed):
        raise PlanError(
            f"{offer.call.op}/{offer.name} uses scratch at {offset} beyond its {offer.candidate.scratch} bytes"
        )
    if offset < offer.candidate.zeroed:
        return offset
    return counters + offset - rest_start(offer.candidate)


def rest_start(candidate: Candidate) -> int:
    """Where the part of a candidate's scratch begins that is no counters."""
    return candidate.zeroed // ALIGNMENT * ALIGNMENT
