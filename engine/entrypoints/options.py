"""What the scripts can be told: one dataclass for each, with types and meanings.

Defaults are in conf/. A type that is checked here is checked before anything is loaded; the texts under
``Attributes`` are what ``--help`` prints.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.checkpoint.paired import Beside
from makeready.graphs.plan.buckets import Traffic
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.speculative import CHAIN, Speculative
from makeready.graphs.plan.targets import TARGETS, find_target
from makeready.graphs.planner.request import Request


class UsageError(ValueError):
    """Options are missing, unknown or contradict each other; one sentence says which and what to write."""


def literal(default: Any = None) -> Any:
    """A field whose value is taken from the command line as it stands, whatever characters are in it."""
    return field(default=default, metadata={"literal": True})


@dataclass
class TrafficOptions:
    """Batches that a plan expects.

    Attributes:
        decode_rows: how often a decode step has so many rows, such as {1: 0.7, 8: 0.3}; {} makes each
            doubling equally likely.
        extend_tokens: how often a prefill step has so many tokens; {} as above.
        extend_rows: how often a prefill step has so many rows; {} as above.
        context: tokens of context a row, for the cost of attention.
    """

    decode_rows: dict[int, float] = MISSING
    extend_tokens: dict[int, float] = MISSING
    extend_rows: dict[int, float] = MISSING
    context: int = MISSING


OF_THEIR_OWN = (
    "target",
    "device",
    "quant",
    "kv_dtype",
    "kv_state_dtype",
    "kv_state_snapshots",
    "speculative",
)  # fields of Request that are no plan.* options


def _plan_options() -> Any:
    """A structured config with the other fields of Request, its types and meanings; conf/ states the defaults."""
    hints = typing.get_type_hints(Request) | {"disabled_passes": list[str]}
    names = [f.name for f in dataclasses.fields(Request) if f.name not in (*OF_THEIR_OWN, "traffic")]
    fields = [(name, hints[name], field(default=MISSING)) for name in names]
    traffic = ("traffic", TrafficOptions, field(default_factory=TrafficOptions))
    made = dataclasses.make_dataclass("PlanOptions", [*fields, traffic])
    made.__doc__ = Request.__doc__
    return made


PlanOptions: Any = _plan_options()


def _speculative_fields() -> Any:
    """A structured config of the fields of Speculative; conf/ states the defaults."""
    hints = typing.get_type_hints(Speculative) | {"tree": list[typing.Any]}
    names = [(f.name, hints[f.name], field(default=MISSING)) for f in dataclasses.fields(Speculative)]
    made = dataclasses.make_dataclass("SpeculativeFields", names)
    made.__doc__ = Speculative.__doc__
    return made


SpeculativeFields: Any = _speculative_fields()


@dataclass
class BesideOptions:
    """What drafts with methods that need a second model; a compiled plan does not hold it, it is named again.

    Attributes:
        checkpoint: a Hugging Face folder, a .gguf file, or dummy: random weights of the speculative.model= preset.
        model: a preset of conf/model for speculative.checkpoint=dummy.
    """

    checkpoint: str | None = literal()
    model: dict[str, Any] | None = None

    @property
    def beside(self) -> Beside:
        """Where it is, absolutely."""
        path = self.checkpoint
        if path not in (None, "dummy"):
            path = str(Path(path).expanduser().resolve())
        return Beside(path, self.model)


@dataclass
class SpeculativeOptions(BesideOptions, SpeculativeFields):  # pyright: ignore[reportGeneralTypeIssues]
    """How tokens are guessed before they are sampled, and by what."""

    def fields(self) -> dict[str, Any]:
        """Fields of :class:`Speculative`."""
        read = (f.name for f in dataclasses.fields(Speculative) if not (self.tree and f.name == CHAIN))
        return {name: getattr(self, name) for name in read}


@dataclass
class PlanOrPath(PlanOptions):  # pyright: ignore[reportGeneralTypeIssues]
    """What a plan is compiled for, or where a compiled one is.

    Attributes:
        path: folder of a compiled plan; plan=FOLDER is short for it. null: a plan is found in the local
            cache or compiled, by the options under plan.
    """

    path: str | None = literal()


@dataclass
class KVOptions:
    """The cache of keys and values.

    Attributes:
        dtype: float32, bfloat16, float16 or fp8_e4m3. null: the activations'.
        memory_gib: memory for KV pages. null: on a GPU all that is free when the plan is loaded, less the plan's
            own memory and a reserve for the driver; on the CPU every row its full context, up to 4 GiB.
        state_dtype: float32, or bfloat16 for half the bytes: how recurrent states are kept, of models that have them.
        state_snapshots: recurrent states that are kept behind cached prefixes, beside those of rows. null: one for
            each plan.traffic.context tokens of pages that plan.max_rows rows do not take.
    """

    dtype: str | None = MISSING
    memory_gib: float | None = MISSING
    state_dtype: str = MISSING
    state_snapshots: int | None = MISSING


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


@dataclass
class Job:
    """What every script that opens a checkpoint is told.

    Attributes:
        checkpoint: a Hugging Face folder, a .gguf file, or dummy: random weights of the model= preset.
        model: a preset of conf/model for checkpoint=dummy; its fields can be changed (model.head_dim=64).
        target: architecture that the plan is for.
        device: which device of the target to choose kernels and batch shapes for, such as h200 or h100; the plan
            runs on the others, too. null: the target's usual one.
        quant: fp8 (8-bit floats with a scale for each output and token) or fp8_block (for each 128 x 128
            weights) quantizes linears when a 16-bit or wider checkpoint is loaded, int8 to integers (scales as
            fp8's), int4, mxfp4 and nvfp4 their weights alone (for each output and 128, 32 or 16 inputs); stored
            multiplies GGUF's blocks as the file has them (on a GPU as integers with scales). null: as the checkpoint
            stores them, GGUF widened.
    """

    checkpoint: str = literal(MISSING)
    model: dict[str, Any] | None = None
    target: str = MISSING
    device: str | None = None
    quant: str | None = None
    plan: PlanOptions = field(default_factory=PlanOptions)  # type: ignore[valid-type]
    kv: KVOptions = field(default_factory=KVOptions)
    speculative: SpeculativeOptions = field(default_factory=SpeculativeOptions)

    def check(self, given: Collection[str]) -> None:
        """Find what contradicts itself before anything is loaded.

        Args:
            given: options as named on the command line.

        Raises:
            UsageError: naming the options.
        """
        if self.target not in TARGETS:
            raise UsageError(f"target={self.target} is not built yet; targets are {', '.join(TARGETS)}")
        try:
            find_target(self.target, self.device)
        except PlanError as error:
            raise UsageError(f"{error}") from None
        if (self.checkpoint == "dummy") != (self.model is not None):
            raise UsageError(
                "checkpoint=dummy needs the model that it stands for; add model=qwen3_8b or another of conf/model"
                if self.model is None
                else f"model= is for checkpoint=dummy, but the checkpoint is {self.checkpoint}; drop one of them"
            )
        if self.plan.candidates != 1 and not TARGETS[self.target].is_cuda:
            raise UsageError(
                f"plan.candidates={self.plan.candidates} is for GPU targets; target={self.target} has one way to "
                "run a call"
            )
        if self.speculative.tree and f"speculative.{CHAIN}" in given:
            raise UsageError(
                f"speculative.{CHAIN}= is of chains, and there is a speculative.tree; leave one out"
            )
        if self.plan.disabled_passes:
            _check_passes(self.plan.disabled_passes)
        if self.kv.memory_gib is not None and not 0 < self.kv.memory_gib < float("inf"):
            raise UsageError(f"kv.memory_gib={self.kv.memory_gib} must be above 0")

    def open(self) -> Checkpoint:
        """The checkpoint, opened."""
        return self.speculative.beside.open(open_checkpoint(self.checkpoint, config=self.model))

    def plan_fields(self) -> dict[str, Any]:
        """Fields of :class:`makeready.graphs.planner.compile.Request`."""
        fields = {f.name: getattr(self.plan, f.name) for f in _fields(PlanOptions)}
        fields["disabled_passes"] = tuple(self.plan.disabled_passes)
        fields["traffic"] = Traffic(**dataclasses.asdict(self.plan.traffic))
        return fields | {
            "target": self.target,
            "device": self.device,
            "quant": self.quant,
            "kv_dtype": self.kv.dtype,
            "kv_state_dtype": self.kv.state_dtype,
            "kv_state_snapshots": self.kv.state_snapshots,
            "speculative": self.speculative.fields(),
        }

    @property
    def kv_bytes(self) -> int | None:
        """``kv.memory_gib`` in bytes."""
        return None if self.kv.memory_gib is None else int(self.kv.memory_gib * 2**30)


def _check_passes(names: Collection[str]) -> None:
    from makeready.graphs.passes import REWRITES  # imports torch: only where passes are named

    unknown = [name for name in names if name not in REWRITES]
    if unknown:
        raise UsageError(
            f"plan.disabled_passes: there is no pass {unknown[0]}; passes are {', '.join(REWRITES)}"
        )


@dataclass
class CompileJob(Job):
    """Options of scripts/compile.py.

    Attributes:
        output: folder for the plan; an older plan there is replaced. null: the local plan cache, where
            generate.py finds it by itself.
        golden: predict a few tokens for these weights on the CPU and keep them beside the plan, for
            generate.py golden=true; reads all weights.
    """

    output: str | None = literal()
    golden: bool = False


SETTLED = (
    "plan.",
    "target.",
    "device.",
    "quant.",
    "kv.dtype.",
    "kv.state_dtype.",
    "kv.state_snapshots.",
    "speculative.",
)  # options that a compiled plan has answered


def check_compiled(plan: PlanOrPath, given: Collection[str]) -> None:
    """Refuse options, as named on the command line, that a plan which is already compiled has settled."""
    named = ("plan.path", "speculative.checkpoint")
    fixed = [o for o in given if o not in named and (o + ".").startswith(SETTLED)]
    if plan.path is not None and fixed:
        raise UsageError(
            f"{', '.join(sorted(fixed))} cannot be chosen beside plan={plan.path}, which is already "
            "compiled; leave it out, or leave out the plan"
        )


@dataclass
class PlanPath:
    """Where a compiled plan is.

    Attributes:
        path: folder of a compiled plan; plan=FOLDER is short for it.
    """

    path: str = literal(MISSING)


@dataclass
class InspectJob:
    """Options of scripts/inspect_plan.py.

    Attributes:
        html: file for a self-contained page with pictures; without it the plan is explained as text.
        context: tokens of context a row that costs are computed for.
    """

    plan: PlanPath = field(default_factory=PlanPath)
    html: str | None = literal()
    context: int = MISSING

    def check(self, given: Collection[str]) -> None:
        """See :meth:`Job.check`."""
        if self.context < 1:
            raise UsageError(f"context={self.context} must be at least 1")
