"""Device launches: what one op call becomes on a GPU, decided ahead of time. Imports no tensor library.

A CUDA implementation of an op is a function from an :class:`OpCall` (everything known of the call when the
plan is made: concrete sizes of the bucket, dtypes, strides, attributes) to :class:`Candidate` s, best
first by its own model of cost. A candidate is a few :class:`DeviceLaunch` es in order and the scratch they
share. Nothing of this runs on the GPU: the planner compiles the launches' kernels to cubins, and the
runtime turns arguments into addresses and launches into graph nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from makeready.kernels.spec import Dim


@dataclass(frozen=True)
class Pointer:
    """Address of an operand or result of the contract, by its name there; column views included."""

    operand: str


@dataclass(frozen=True)
class Scratch:
    """Address of the call's scratch plus ``offset`` bytes.

    Scratch is shared by all calls of a plan's lane, so its content is undefined, except that its first
    ``Candidate.zeroed`` bytes are zero when the call starts and must be zero again when it ends (counters
    of blocks, the last of which goes on).
    """

    offset: int
    dtype: str


@dataclass(frozen=True)
class Scalar:
    """A number passed at launch, such as how many rows the bucket has.

    Attributes:
        specialize: whether the kernel is compiled anew for multiples of 16, so that addresses computed from
            the value keep wide loads. Right for strides, wrong for what varies between buckets and enters
            no address, since every kernel would come twice.
    """

    value: int | float
    dtype: str  # int32, int64 or float32
    specialize: bool = True


@dataclass(frozen=True)
class Descriptor:
    """A TMA tensor map over an operand, encoded when the plan is loaded; a host tensor descriptor in Triton.

    Triton's compiler decides on box and swizzle; for CUDA C++ the box is ``block`` and the swizzle ``swizzle``.

    Attributes:
        operand: as in :class:`Pointer`.
        shape: elements of each axis, outermost first; may hold the symbol P. The first may be more than the
            operand has where that is ``spare``.
        strides: elements between neighbours along each axis; the last is 1.
        block: elements of each axis that one copy moves.
        swizzle: bytes of the pattern in shared memory (0, 32, 64 or 128); None for Triton alone.
        promotion: bytes that come to L2 where any of them is asked for (128 or 256).
    """

    operand: str
    shape: tuple[Dim, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    swizzle: int | None = None
    promotion: int = 128


Argument: TypeAlias = Pointer | Scratch | Scalar | Descriptor


@dataclass(frozen=True)
class DeviceLaunch:
    """One kernel node.

    Attributes:
        function: a ``@triton.jit`` function as ``module:name``, or a CUDA C++ one as ``csrc/file.cu:name``.
        constants: parameters that are known when it is compiled (None too: an absent optional operand); of CUDA
            C++ its macros, integers or names.
        arguments: its other parameters, by name.
        grid: blocks along x, y, z.
        num_warps, num_stages: compile options of Triton. CUDA C++ says itself how many threads it has.
        dependent: the kernel waits (``gdc_wait``, ``griddepcontrol.wait``) before it touches what earlier kernels
            wrote, so it may be started before they end (a programmatic edge).
        early: operands that it reads before it waits. Those that are no parameters were made before some kernel ahead
            of it started, which the planner sees to.
        local_bytes: local memory that a thread may use; a plan is refused when the compiled kernel spills
            more.
    """

    function: str
    constants: Mapping[str, int | float | bool | str | None]
    arguments: Mapping[str, Argument]
    grid: tuple[int, int, int]
    num_warps: int = 4
    num_stages: int = 3
    dependent: bool = False
    early: tuple[str, ...] = ()
    local_bytes: int = 0


@dataclass(frozen=True)
class Candidate:
    """One way to run a call: launches in order, and bytes of scratch (of which ``zeroed`` are counters).

    Attributes:
        seconds: what it should cost, to compare ways and to predict steps; 0 where the implementation
            does not know.
    """

    name: str
    launches: tuple[DeviceLaunch, ...]
    scratch: int = 0
    zeroed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Tensor:
    """An operand or result at concrete sizes.

    Attributes:
        shape: elements of each axis; the symbol P stays where memory decides.
        dtype: a name of kernels/spec.py.
        row_stride: elements from one row (axis 0) to the next; more than a row's where it is a column view.
        alignment: bytes that its address is surely a multiple of.
        spare: whether a tensor map may reach some tiles beyond the last row: the memory there belongs to the
            plan and holds anything. Rows that a map's bounds cut off are zeros, which the GPU makes slowly.
    """

    shape: tuple[Dim, ...]
    dtype: str
    row_stride: int
    alignment: int
    spare: bool = False


# What cost models were fitted on, measured there: bytes/s of a copy, and operations/s of large products.
H100_BANDWIDTH = 3.0e12
H100_FLOPS: Mapping[str, float] = {
    "float32": 779e12 / 12,
    "bfloat16": 779e12,
    "float16": 779e12,
    "float8_e4m3fn": 1402e12,
    "int8": 1402e12,  # by the data sheet as many as of 8-bit floats
}


@dataclass(frozen=True)
class OpCall:
    """A call of a contract in one bucket, as implementations see it.

    Attributes:
        op: the contract's name.
        tensors: operands and results by their names in the contract; absent optional ones are missing.
        attrs: the contract's attributes.
        dims: value of every axis name and numeric attribute (``{"T": 16, "N": 4096, ...}``).
        rows, tokens: of the bucket.
        context: tokens of context a row that the plan expects, for cost models alone.
        multiprocessors, bandwidth, flops: of the device that choices are made for: how many, bytes a second from
            memory, and operations a second by dtype; by default an H100's. For cost models and the size of grids:
            results are the same whatever they say.
        shared_bytes: shared memory that one block can have on the target.
        invariant: candidates must compute a row from that row alone, to the last bit. What they compute may depend
            on their constants and compile options, of which the planner takes the same for all buckets, but not on
            the grid nor on arguments that differ between buckets.
        most_rows: rows of the plan's largest bucket.
    """

    op: str
    tensors: Mapping[str, Tensor]
    attrs: Mapping[str, Any]
    dims: Mapping[str, Any]
    rows: int
    tokens: int
    context: int = 1024
    multiprocessors: int = 132
    bandwidth: float = H100_BANDWIDTH
    flops: Mapping[str, float] = field(default_factory=lambda: H100_FLOPS)
    shared_bytes: int = 232448
    features: frozenset[str] = field(default_factory=frozenset)  # of the target: "tma", "wgmma", "pdl", "fp8"
    invariant: bool = False
    most_rows: int = 1
