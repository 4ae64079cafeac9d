"""What a plan says, as frozen values. The runtime reads this module without torch or triton.

    Plan
      limits, kv, buckets          what the runtime may ask for and how pages look
      weights                      recipe and place of every parameter
      programs[phase]              launches over named buffers
      memory                       bytes of every region

A launch names its operands; a name is looked up in the program's arena buffers, then among the plan's
weights, the step, slot and result fields (graphs/spec.py) and the KV parts. Shapes are symbolic: the same
launches serve every bucket of a phase, at the same arena offsets, which are those of its largest bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from makeready.graphs.recipe import Param
from makeready.graphs.spec import Bucket, KVSpec, Limits
from makeready.kernels.spec import TensorSpec

SCHEMA = 1


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
    """One kernel call: operand and result names → value names, attributes, and which implementation."""

    op: str
    kernel: str
    operands: Mapping[str, str]
    results: Mapping[str, str]
    attrs: Mapping[str, Any]


@dataclass(frozen=True)
class LoweredProgram:
    """A phase's launches in order, the arena buffers they use, and where results end up."""

    phase: str
    launches: tuple[Launch, ...]
    buffers: Mapping[str, Buffer]


@dataclass(frozen=True)
class Weight:
    """A parameter and its place in the weights region, in bytes."""

    param: Param
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of every region; KV takes ``kv.page_bytes`` for each page that fits into what is left."""

    weights: int
    arena: int
    step: int
    slot: int
    result: int

    @property
    def fixed(self) -> int:
        """All that is needed before the first KV page."""
        return self.weights + self.arena + self.step + self.slot + self.result


@dataclass(frozen=True)
class Options:
    """Choices that went into a plan, kept so that a plan explains itself and a cache finds it again.

    Attributes:
        weight_dtype: dtype that matrices are stored in.
        activation_dtype: dtype between kernels, and of norms and biases.
        kv_dtype: dtype of cached keys and values.
        disabled_passes: rewrites that were left out.
        max_decode_buckets, max_extend_buckets: bounds on how many programs a phase is cut into.
        traffic: expected batches; see graphs/traffic.py.
    """

    weight_dtype: str
    activation_dtype: str
    kv_dtype: str
    disabled_passes: tuple[str, ...] = ()
    max_decode_buckets: int = 16
    max_extend_buckets: int = 24
    traffic: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first request. Made by graphs/compile.py."""

    schema: int
    target: str
    architecture: str
    checkpoint: str
    tokenizer: Mapping[str, str]
    config: Mapping[str, Any]
    limits: Limits
    options: Options
    kv: KVSpec
    buckets: tuple[Bucket, ...]
    memory: Memory
    weights: tuple[Weight, ...]
    programs: Mapping[str, LoweredProgram]
