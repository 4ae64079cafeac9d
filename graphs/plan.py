"""What a plan says, as frozen values. The runtime reads this module without torch or triton.

    Plan
      limits, kv, buckets          what the runtime may ask for and how pages look
      steps, slots                 what each kind of step stages and reports, what the device keeps of a sequence
      weights                      recipe and place of every parameter
      programs[phase]              launches over named buffers; on a GPU the kernel nodes of each
      loading                      on a GPU, what quantizes weights on their way in
      binaries                     compiled kernels that nodes name
      memory                       bytes of every region

A launch names its operands; a name is looked up in the program's arena buffers, then among the plan's
weights, the fields of its step, those of the slots, and the KV parts. Shapes are symbolic: the same
launches serve every bucket of a phase, at the same arena offsets, which are those of its largest bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from makeready.graphs.recipe import Param, Piece
from makeready.graphs.spec import Bucket, CacheSpec, Field, Limits, StepSpec
from makeready.kernels.spec import TensorSpec

SCHEMA = 2


class PlanError(ValueError):
    """A plan cannot be made, read or used; the message names the field and the remedy."""


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
class Binary:
    """One compiled kernel, whose machine code is ``Plan.cubins`` under the same key.

    Attributes:
        function: its entry point.
        sha256: of the machine code.
        warps: threads of a block over 32.
        shared: bytes of dynamic shared memory.
        registers: of a thread.
        spill_bytes: of local memory a thread has, for spilled registers and arrays.
        dependent: it waits on the device for the kernels before it, so it may be launched early.

    Its parameters are a node's arguments in order, then two null pointers (Triton's scratch pointers).
    """

    function: str
    sha256: str
    warps: int
    shared: int
    registers: int
    spill_bytes: int
    dependent: bool


@dataclass(frozen=True)
class NodeArgument:
    """One argument of a kernel node, by ``kind``:

    ``pointer``     the address of ``operand``: 8 bytes
    ``scratch``     the address of the plan's scratch region plus ``offset``: 8 bytes
    ``scalar``      ``value`` as ``dtype`` (int32, int64 or float32): 4 or 8 bytes
    ``descriptor``  a tensor map over ``operand``, which fills rank + rank + 1 parameters: the CUtensorMap
                    (128 bytes by value, 64-byte aligned), then ``shape`` as int32 each, then ``strides``
                    as int64 each

    Attributes:
        operand: an operand or result of the contract; the launch says which value it stands for.
        dtype: of what is pointed at, of the scalar, or of the map's elements.
        shape, strides: of a map, in elements, outermost axis first; the shape may hold the symbol P.
        block: elements of each axis that one copy moves, as the kernel was compiled: the box of the map.
        swizzle, element_type: the map's, as numbers of CUtensorMapSwizzle and CUtensorMapDataType.

    Maps have no interleave, element strides of 1, 128-byte L2 promotion, and zeros beyond their bounds.
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


@dataclass(frozen=True)
class Node:
    """One kernel node: which binary, its blocks along x, y, z, its arguments in the binary's order."""

    binary: str
    grid: tuple[int, int, int]
    arguments: tuple[NodeArgument, ...]
    dependent: bool = False


@dataclass(frozen=True)
class Choice:
    """One way to run a call: nodes in order."""

    name: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class OpClass:
    """What calls that are alike but for names run on the GPU.

    Attributes:
        candidates: by ``str(bucket)``, best first; the first is run unless :attr:`Plan.tuned` says otherwise.
    """

    op: str
    candidates: Mapping[str, tuple[Choice, ...]]


@dataclass(frozen=True)
class LoweredProgram:
    """A phase's launches in order, the arena buffers they use, and the classes that launches index."""

    phase: str
    launches: tuple[Launch, ...]
    buffers: Mapping[str, Buffer]
    classes: tuple[OpClass, ...] = ()


@dataclass(frozen=True)
class Weight:
    """A parameter and its place in the weights region, in bytes."""

    param: Param
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Conversion:
    """How parameters are made of checkpoint rows on the GPU, a chunk of rows at a time.

    Attributes:
        pieces: the rows, in the order and at the places in which they make up the operand.
        launches: for every chunk, in the order of rows, its launch in :attr:`Loading.program`: a chunk has
            as many rows as that launch's operand, and its results follow those of the chunk before.
        results: byte offset in the weights region at which each result begins, by its name in the contract.
    """

    pieces: tuple[Piece, ...]
    launches: tuple[int, ...]
    results: Mapping[str, int]


@dataclass(frozen=True)
class Loading:
    """What runs on the GPU while a plan is loaded, before its first step, in no particular order.

    Rows of a chunk come to a slot, a launch reads them there and writes its results where parameters lie.
    Slots lie one after the other from the start of the arena, which nothing uses yet; launches in different
    slots may run at once, so none has scratch.

    Attributes:
        program: one launch for each shape of a chunk, under the bucket :data:`LOAD`. Its buffers are no
            places: an offset says what the address is a multiple of.
        conversions: all parameters that have :attr:`~makeready.graphs.recipe.Param.derived`.
        slot_bytes: of a slot, at least a chunk's.
        slots: how many there are.
    """

    program: LoweredProgram
    conversions: tuple[Conversion, ...]
    slot_bytes: int
    slots: int


LOAD = Bucket("load", 1, 1)


@dataclass(frozen=True)
class Memory:
    """Bytes of every region; the cache takes what is left, see :meth:`Plan.pages_in`.

    ``scratch`` is shared by all kernels of a plan and must be zero when the plan is loaded; afterwards the
    kernels leave their counters in it at zero.
    """

    weights: int
    arena: int
    step: int
    slot: int
    result: int
    scratch: int = 0

    @property
    def fixed(self) -> int:
        """All that is needed before the first KV page."""
        return self.weights + self.arena + self.step + self.slot + self.result + self.scratch


@dataclass(frozen=True)
class Options:
    """Choices that went into a plan, kept so that a plan explains itself and a cache finds it again.

    Attributes:
        weight_dtype: dtype that matrices are stored in.
        activation_dtype: dtype between kernels, and of norms and biases.
        kv_dtype: dtype of cached keys and values.
        quant: what linears are quantized to when they are loaded; None leaves them as the checkpoint does.
        deterministic: whether a token's numbers depend on its request alone, to the last bit.
        disabled_passes: rewrites that were left out.
        max_decode_buckets, max_extend_buckets: bounds on how many programs a phase is cut into.
        candidates: at most so many ways to run a call are kept for tuning.
        traffic: expected batches; see graphs/buckets.py.
    """

    weight_dtype: str
    activation_dtype: str
    kv_dtype: str
    quant: str | None = None
    deterministic: bool = False
    disabled_passes: tuple[str, ...] = ()
    max_decode_buckets: int = 16
    max_extend_buckets: int = 24
    candidates: int = 1
    traffic: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first request. Made by graphs/compile.py.

    Attributes:
        target: architecture that it runs on, of graphs/targets.py.
        device: which device of it buckets and kernels were chosen for, of graphs/devices.py; it runs on others.
            Empty in plans of versions that named none.
        steps: every kind of step that there are programs for, by name.
        slots: the slot table, which all steps share.
        loading: how parameters are quantized on the GPU; None where none is, and on the CPU, which follows
            the recipe with the op references.
        binaries: compiled kernels by key; empty for the CPU.
        cubins: their machine code by the same keys. Its bytes are files of their own, which
            :attr:`Binary.sha256` ties to the plan's digest; planning and the CPU work without them.
        dropped: a line for each way to run a call that the target's resources ruled out.
        tuned: by device name and :func:`tuned_key`, the name of the choice that measured best there.
    """

    schema: int
    target: str
    architecture: str
    checkpoint: str
    tokenizer: Mapping[str, str]
    config: Mapping[str, Any]
    limits: Limits
    options: Options
    kv: CacheSpec
    steps: Mapping[str, StepSpec]
    slots: tuple[Field, ...]
    buckets: tuple[Bucket, ...]
    memory: Memory
    weights: tuple[Weight, ...]
    programs: Mapping[str, LoweredProgram]
    device: str = ""
    loading: Loading | None = None
    binaries: Mapping[str, Binary] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    tuned: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cubins: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def lasting(self) -> Mapping[str, TensorSpec]:
        """Spec of every value that lasts from step to step: slot fields, the cache, weights."""
        named = {f.name: f.spec for f in self.slots} | {part.name: part.spec for part in self.kv.parts}
        return named | {w.param.name: w.param.spec for w in self.weights}

    def specs(self, phase: str) -> Mapping[str, TensorSpec]:
        """Spec of every value that launches of ``phase`` may name, arena buffers excepted."""
        step = self.steps.get(phase)
        own = () if step is None else (*step.staged, *step.results)
        return {**self.lasting, **{f.name: f.spec for f in own}}

    def spec(self, phase: str, name: str) -> TensorSpec:
        """Spec of the value that launches of ``phase`` call ``name``."""
        buffer = self.programs[phase].buffers.get(name)
        return buffer.spec if buffer is not None else self.specs(phase)[name]

    @property
    def digest(self) -> str:
        """SHA-256 of everything the plan says, as 64 hexadecimal digits."""
        from makeready.graphs import artifact

        return artifact.digest(self)  # pyright: ignore[reportArgumentType]

    def save(self, folder: str | Path) -> Path:
        """Write the plan to ``folder``; see :func:`makeready.graphs.artifact.save`."""
        from makeready.graphs import artifact

        return artifact.save(self, folder)  # pyright: ignore[reportArgumentType]

    def as_text(self) -> str:
        """The plan explained, in 110 columns; see :mod:`makeready.graphs.inspect.text`."""
        from makeready.graphs.inspect.text import plan_text

        return plan_text(self)  # pyright: ignore[reportArgumentType]

    def memory_analysis(self) -> dict[str, Any]:
        """Bytes of every region and KV capacity; see :mod:`makeready.graphs.inspect.analysis`."""
        from makeready.graphs.inspect.analysis import memory_analysis

        return memory_analysis(self)  # pyright: ignore[reportArgumentType]

    def cost_analysis(self, context: int = 1024) -> dict[Bucket, dict[str, float]]:
        """Bytes, operations and roofline time by bucket; see :mod:`makeready.graphs.inspect.analysis`."""
        from makeready.graphs.inspect.analysis import cost_analysis

        return cost_analysis(self, context)  # pyright: ignore[reportArgumentType]

    def pages_in(self, nbytes: int) -> int:
        """KV pages, the null page included, that ``nbytes`` of memory leave room for.

        Blocks of cache groups whose number does not depend on memory are counted off first.

        Raises:
            PlanError: not even one page that a request could use fits.
        """
        fixed = self.memory.fixed + self.kv.bounded_bytes(self.limits)
        pages = (nbytes - fixed) // self.kv.page_bytes
        if pages < 2:
            raise PlanError(
                f"{nbytes / 2**30:.2f} GiB of memory are too little: the plan's fixed memory takes "
                f"{fixed / 2**30:.2f} GiB and two KV pages {2 * self.kv.page_bytes / 2**30:.3f} GiB"
            )
        return pages


def tuned_key(phase: str, op_class: int, bucket: Bucket) -> str:
    """Where :attr:`Plan.tuned` keeps the choice for calls of a class in a bucket."""
    return f"{phase}/{op_class}/{bucket}"
