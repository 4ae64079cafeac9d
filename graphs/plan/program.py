"""What a plan runs: launches over named buffers, and on a GPU the kernel nodes of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.graphs.plan.spec import Bucket
from makeready.kernels.spec import TensorSpec


@dataclass(frozen=True)
class Buffer:
    """A temp's place in the arena.

    Attributes:
        offset: bytes from the start of the arena.
        row_stride: elements from one row to the next where the buffer is columns of a wider one.
        first, last: positions of the launches between which it is alive, for pictures and checks.
    """

    spec: TensorSpec
    offset: int
    row_stride: int | None
    first: int
    last: int


@dataclass(frozen=True)
class Launch:
    """One kernel call: operand and result names → value names, attributes, and which implementation.

    On a GPU ``kernel`` is the reference, which the CPU interpreter runs as the oracle of the plan, and
    ``op_class`` indexes :attr:`LoweredProgram.classes`, which says what the GPU runs.
    """

    op: str
    kernel: str
    operands: Mapping[str, str]
    results: Mapping[str, str]
    attrs: Mapping[str, Any]
    op_class: int = -1


@dataclass(frozen=True)
class Chain:
    """Neighbouring launches, and the one call that takes their place in buckets in which its class has candidates.

    What one of them gives and only the next one reads is not written then. Operands of all of them are alive until
    the last.

    Attributes:
        launch: the call; its op's contract ``chains`` the ops of the launches.
        first, stop: position of the first launch, and behind the last.
    """

    launch: Launch
    first: int
    stop: int


@dataclass(frozen=True)
class Lane:
    """Neighbouring launches that run beside those ahead of them, on a GPU; see graphs/plan/lanes.py.

    They are in order among themselves, start when launch ``fork`` has ended, and run beside the launches between it
    and them. The launch behind them starts when both have ended.

    Attributes:
        fork: position of the launch that they start behind.
        first, stop: position of the first launch, and behind the last.
    """

    fork: int
    first: int
    stop: int


@dataclass(frozen=True)
class Binary:
    """One compiled kernel, whose machine code is ``Plan.cubins`` under the same key.

    Attributes:
        function: its entry point.
        sha256: of the machine code.
        nbytes: of the machine code.
        warps: threads of a block over 32.
        shared: bytes of dynamic shared memory.
        registers: of a thread.
        spill_bytes: of local memory a thread has, for spilled registers and arrays.
        dependent: it waits on the device for the kernels before it, so it may be launched early.
        null_pointers: how many end its parameters: two of Triton's (its scratch pointers), none of CUDA C++'s.
        cluster: blocks of a cluster along x, which the machine code holds; a grid has whole clusters.

    Its parameters are a node's arguments in order, then the null pointers.
    """

    function: str
    sha256: str
    warps: int
    shared: int
    registers: int
    spill_bytes: int
    dependent: bool
    nbytes: int
    null_pointers: int = 2
    cluster: int = 1


@dataclass(frozen=True)
class NodeArgument:
    """One argument of a kernel node, by ``kind``:

    ``pointer``     the address of ``operand``: 8 bytes
    ``scratch``     the address of the plan's scratch region plus ``offset``: 8 bytes
    ``scalar``      ``value`` as ``dtype`` (int32, int64 or float32): 4 or 8 bytes
    ``map``         a tensor map over ``operand``: the CUtensorMap, 128 bytes by value, 64-byte aligned
    ``descriptor``  the same and what Triton passes with it, which makes 2 * rank + 1 parameters: the map, then
                    ``shape`` as int32 each, then ``strides`` as int64 each

    Attributes:
        operand: an operand or result of the contract; the launch says which value it stands for.
        dtype: of what is pointed at, of the scalar, or of the map's elements.
        shape, strides: of a map, in elements, outermost axis first; the shape may hold the symbol P.
        block: elements of each axis that one copy moves: the box of the map.
        swizzle, element_type, promotion: the map's, as numbers of CUtensorMapSwizzle, CUtensorMapDataType and
            CUtensorMapL2promotion.

    Maps have no interleave, element strides of 1, and zeros beyond their bounds.
    """

    kind: str
    operand: str = ""
    offset: int = 0
    value: int | float = 0
    dtype: str = ""
    shape: tuple[int | str, ...] = ()
    strides: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    swizzle: int = 0
    element_type: int = 0
    promotion: int = 2


@dataclass(frozen=True)
class Node:
    """One kernel node: which binary, its blocks along x, y, z, its arguments in the binary's order."""

    binary: str
    grid: tuple[int, int, int]
    arguments: tuple[NodeArgument, ...]
    dependent: bool = False


@dataclass(frozen=True)
class PlanCandidate:
    """One way to run a call: nodes in order.

    Attributes:
        nanoseconds: what its kernel's own model expects of it on the plan's device, at the context of the plan's
            traffic; whole, so that plans are the same everywhere. 0 where it has no model.
    """

    name: str
    nodes: tuple[Node, ...]
    nanoseconds: int = 0


@dataclass(frozen=True)
class OpClass:
    """What calls that are alike but for names run on the GPU.

    Attributes:
        candidates: by ``str(bucket)``, best first; the first is run unless :attr:`Plan.tuned` says otherwise.
    """

    op: str
    candidates: Mapping[str, tuple[PlanCandidate, ...]]


APART = "apart"  # the choice to run the launches of a chain one by one
ONE_LANE = "one lane"  # the choice to run all launches of a bucket one after the other


@dataclass(frozen=True)
class LoweredProgram:
    """A phase's launches in order, the arena buffers they use, and the classes that launches index.

    Attributes:
        chains: by place, the longest first; they may overlap, and the first that has candidates is run.
        joins: positions of launches that start only when all before them in their lane have ended, dependent or not.
        lanes: by place, what runs in the side lane; one ends before the next one forks.
        alignments: bytes that addresses of values outside the arena are surely multiples of, where that is
            less than what regions and all in them are aligned to.
    """

    phase: str
    launches: tuple[Launch, ...]
    buffers: Mapping[str, Buffer]
    classes: tuple[OpClass, ...] = ()
    alignments: Mapping[str, int] = field(default_factory=dict)
    chains: tuple[Chain, ...] = ()
    joins: tuple[int, ...] = ()
    lanes: tuple[Lane, ...] = ()

    def candidate(self, op_class: int, bucket: Bucket, tuned: Mapping[str, str]) -> PlanCandidate | None:
        """How calls of a class run in ``bucket``: as ``tuned`` names it, else the planner's first candidate."""
        if not 0 <= op_class < len(self.classes):
            return None
        found = self.classes[op_class].candidates.get(str(bucket), ())
        name = tuned.get(tuned_key(bucket.phase, op_class, bucket))
        return next((c for c in found if c.name == name), found[0] if found else None)

    def calls(self, bucket: Bucket, tuned: Mapping[str, str], only: slice = slice(None)) -> list[Chain]:
        """What runs in ``bucket``, in order: chains, and every other launch as a chain of one.

        Args:
            tuned: by :func:`tuned_key`, choices in place of the planner's.
            only: which launches; those of a chain that it cuts run one by one.
        """
        starts: dict[int, list[Chain]] = {}
        for chain in self.chains:
            starts.setdefault(chain.first, []).append(chain)
        made: list[Chain] = []
        at, stop, _ = only.indices(len(self.launches))
        while at < stop:
            call = Chain(self.launches[at], at, at + 1)
            for chain in starts.get(at, ()):
                chosen = self.candidate(chain.launch.op_class, bucket, tuned)
                if chain.stop <= stop and chosen is not None and chosen.name != APART:
                    call = chain
                    break
            made.append(call)
            at = call.stop
        return made


@dataclass(frozen=True)
class LoadResult:
    """A value that a load program leaves in the weights region: what launches call it, and its spec."""

    name: str
    spec: TensorSpec


@dataclass(frozen=True)
class LoadProgram:
    """What makes some units of parameters: a program like a step's, over one place of the arena.

    Attributes:
        program: launches under the phase ``load.<number>``, and their buffers at offsets from the start of
            the place. The loader fills those in ``operands`` before the first launch.
        bucket: as many tokens as the program runs units.
        operands: the buffers that hold the derivation's operands, called like them.
        results: by the names that the derivation has for them.
    """

    program: LoweredProgram
    bucket: Bucket
    operands: tuple[str, ...]
    results: Mapping[str, LoadResult]


@dataclass(frozen=True)
class Conversion:
    """The making of a derivation's parameters, in runs of some units each.

    Attributes:
        runs: the unit behind each run's last, and the number of its program in :attr:`Loading.programs`.
            The first begins at unit 0; what each run gives follows what the run before gave.
        results: which of ``Plan.weights`` each of the derivation's results is. Their recipes say what the
            operands are.
    """

    runs: tuple[tuple[int, int], ...]
    results: Mapping[str, int]


@dataclass(frozen=True)
class Loading:
    """What runs on the GPU while a plan is loaded, before its first step, in no particular order.

    Places lie one after the other from the start of the arena, which no step uses yet. Runs in different
    places may overlap, so launches have no scratch.

    Attributes:
        programs: one for each derivation and number of units; parameters that are alike share them.
        conversions: all parameters that have :attr:`~makeready.graphs.plan.recipe.Param.derived`.
        place_bytes: of a place, at least what the greediest program needs.
        places: how many there are.
    """

    programs: tuple[LoadProgram, ...]
    conversions: tuple[Conversion, ...]
    place_bytes: int
    places: int


def tuned_key(phase: str, op_class: int, bucket: Bucket) -> str:
    """Where :attr:`Plan.tuned` keeps the choice for calls of a class in a bucket."""
    return f"{phase}/{op_class}/{bucket}"


def lanes_key(bucket: Bucket) -> str:
    """Where :attr:`Plan.tuned` keeps whether a bucket has :data:`ONE_LANE` though its program has two."""
    return f"{bucket.phase}/lanes/{bucket}"
