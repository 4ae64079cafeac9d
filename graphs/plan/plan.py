"""What a plan says, as frozen values. The runtime reads this module without torch or triton.

    Plan
      limits, kv, buckets          what the runtime may ask for and how pages look
      steps, slots                 what each kind of step stages and reports, what the device keeps of a sequence
      weights                      recipe and place of every parameter
      programs[phase]              launches over named buffers; on a GPU the kernel nodes of each
      loading                      on a GPU, programs that make parameters of the checkpoint's boxes
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

from makeready.graphs.plan.program import Binary, Loading, LoweredProgram
from makeready.graphs.plan.recipe import Param
from makeready.graphs.plan.spec import LATE, LEAST_PAGES, Bucket, CacheSpec, Field, Limits, StepSpec
from makeready.graphs.plan.speculative import Speculative
from makeready.kernels.spec import TensorSpec

SCHEMA = 5


class PlanError(ValueError):
    """A plan cannot be made, read or used; the message names the field and the remedy."""


@dataclass(frozen=True)
class Weight:
    """A parameter and its place in the weights region, in bytes."""

    param: Param
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of every region; the cache takes what is left, see :meth:`Plan.pages_in`.

    ``scratch`` is shared by all kernels of a plan and must be zero when the plan is loaded; afterwards the
    kernels leave their counters in it at zero. Where programs have a side lane, its kernels have the half from
    ``side_scratch`` on, and all others the half before it.
    """

    weights: int
    arena: int
    step: int
    slot: int
    result: int
    scratch: int = 0
    side_scratch: int = 0

    @property
    def lane_scratch(self) -> int:
        """Scratch of a lane."""
        return self.side_scratch or self.scratch

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
        lanes: whether independent branches of a layer run beside each other on a GPU.
        traffic: expected batches; see graphs/plan/buckets.py.
        speculative: how tokens are guessed before they are sampled.
        kv_state_dtype: dtype of recurrent states, where the model has some.
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
    lanes: bool = False
    traffic: Mapping[str, Any] = field(default_factory=dict)
    speculative: Speculative = field(default_factory=Speculative)
    kv_state_dtype: str = "float32"


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first request. Made by graphs/planner/compile.py.

    Attributes:
        target: architecture that it runs on, of graphs/plan/targets.py.
        device: which device of it buckets and kernels were chosen for, of graphs/plan/devices.py; it runs on others.
            Empty in plans of versions that named none.
        steps: every kind of step that there are programs for, by name.
        slots: the slot table, which all steps share.
        loading: how parameters are derived on the GPU; None where none is, and on the CPU, which follows
            the recipes with the op references.
        binaries: compiled kernels by key; empty for the CPU.
        cubins: their machine code by the same keys. Its bytes are files of their own, which
            :attr:`Binary.sha256` ties to the plan's digest; planning and the CPU work without them.
        dropped: a line for each way to run a call that the target's resources ruled out.
        tuned: by device name and :func:`~.program.tuned_key` or :func:`~.program.lanes_key`, the name of the choice
            that measured best there.
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

    def cut(self, phase: str) -> int:
        """How many launches of ``phase`` come before the first that reads what the host may write while they run."""
        late = {f.name for f in self.slots if f.keeper == LATE}
        launches = self.programs[phase].launches
        reads = (at for at, launch in enumerate(launches) if not late.isdisjoint(launch.operands.values()))
        return next(reads, len(launches))

    def early(self, phase: str) -> int:
        """How many launches of ``phase`` come before all results are there that the host may read at the cut."""
        names = set(self.steps[phase].early)
        launches = self.programs[phase].launches
        return max(
            (at + 1 for at, one in enumerate(launches) if names & set(one.results.values())), default=0
        )

    @property
    def digest(self) -> str:
        """SHA-256 of everything the plan says, as 64 hexadecimal digits."""
        from makeready.graphs.plan import artifact

        return artifact.digest(self)  # pyright: ignore[reportArgumentType]

    def save(self, folder: str | Path) -> Path:
        """Write the plan to ``folder``; see :func:`makeready.graphs.plan.artifact.save`."""
        from makeready.graphs.plan import artifact

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

        Room for the windows and states of that many pages is left beside them.

        Raises:
            PlanError: not even one page that a request could use fits, or not what a row has beside it.
        """
        fixed = self.memory.fixed
        pages = self.kv.pages_in(nbytes - fixed, self.limits)
        if not pages:
            raise PlanError(
                f"{nbytes / 2**30:.2f} GiB of memory are too little: the plan's fixed memory takes "
                f"{fixed / 2**30:.2f} GiB and {self.least_cache('free some')}"
            )
        return pages

    def least_cache(self, remedy: str) -> str:
        """What the smallest cache takes, and how to do with it: ``remedy``, or what makes it smaller."""
        from makeready.graphs.inspect.units import nbytes

        two = f"two KV pages {nbytes(LEAST_PAGES * self.kv.page_bytes)}"
        if not self.kv.bounded:
            return f"{two}; {remedy}"
        beside = nbytes(self.kv.bounded_bytes(LEAST_PAGES, self.limits))
        kept = self.kv.split(LEAST_PAGES, self.limits).snapshots
        remedies = [remedy, *[f"lower kv.state_snapshots={kept}"] * bool(kept)]
        wide = bool(self.kv.states) and self.options.kv_state_dtype == "float32"
        remedies += ["compile with kv.state_dtype=bfloat16"] * wide
        snapshots = f" and of {kept} snapshots" * bool(kept)
        return f"{two}, beside windows and states of one row{snapshots} {beside}; {' or '.join(remedies)}"
