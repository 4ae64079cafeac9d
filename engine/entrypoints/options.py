"""What the scripts can be told: one dataclass for each, with types and meanings.

Defaults are in conf/. A type that is checked here is checked before anything is loaded; the texts under
``Attributes`` are what ``--help`` prints.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from makeready.engine.errors import RequestError
from makeready.engine.sampling import SamplingParams
from makeready.graphs.buckets import Traffic
from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.targets import TARGETS

FORMATS = ("auto", "rows", "openai")  # of batch rows


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


@dataclass
class PlanOptions:
    """What a plan is compiled for.

    Attributes:
        max_rows: requests that run at once.
        max_tokens: tokens of one step over all rows; longer prompts go in chunks. null: the target's.
        context_len: tokens of one request, prompt and output together. null: all that the model allows.
        page_size: tokens of a KV page. null: the target's.
        weight_dtype: float32, bfloat16 or float16. null: the checkpoint's, float16 for GGUF blocks; the
            activations' on a GPU.
        activation_dtype: what flows between kernels: bfloat16 or float16 on a GPU. null: the target's.
        disabled_passes: rewrites of the program to leave out, by name.
        max_decode_buckets: most batch sizes that decode steps are compiled for.
        max_extend_buckets: most batch shapes that prefill steps are compiled for.
        candidates: ways of running each call that a plan for a GPU carries, best first by the cost model.
        traffic: batches to expect; they decide where buckets are dense, never what is legal.
    """

    max_rows: int = MISSING
    max_tokens: int | None = MISSING
    context_len: int | None = MISSING
    page_size: int | None = MISSING
    weight_dtype: str | None = MISSING
    activation_dtype: str | None = MISSING
    disabled_passes: list[str] = MISSING
    max_decode_buckets: int = MISSING
    max_extend_buckets: int = MISSING
    candidates: int = MISSING
    traffic: TrafficOptions = field(default_factory=TrafficOptions)


@dataclass
class PlanOrPath(PlanOptions):
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
        memory_gib: memory for KV pages. null: every row its full context, up to 4 GiB.
    """

    dtype: str | None = MISSING
    memory_gib: float | None = MISSING


def _loosely_typed(params: type) -> type:
    """A structured config with the fields of ``params``, which checks what OmegaConf has no type for."""
    hints = typing.get_type_hints(params)
    fields = [(f.name, _plain(hints[f.name]), MISSING) for f in _fields(params)]
    made = dataclasses.make_dataclass("SamplingOptions", fields)
    made.__doc__ = params.__doc__
    return made


def _plain(hint: Any) -> Any:
    if typing.get_origin(hint) is Mapping:
        key, value = typing.get_args(hint)
        return dict[key, value]
    return hint if hint in (int, float, bool, int | None, float | None) else Any


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


SamplingOptions = _loosely_typed(SamplingParams)


@dataclass
class Job:
    """What every script that opens a checkpoint is told.

    Attributes:
        checkpoint: a Hugging Face folder, a .gguf file, or dummy: random weights of the model= preset.
        model: a preset of conf/model for checkpoint=dummy; its fields can be changed (model.head_dim=64).
        target: machine that the plan is for.
        quant: fp8 (8-bit floats with a scale for each output and token) or fp8_block (for each 128 x 128
            weights) quantizes linears when a 16-bit or wider checkpoint is loaded. null: as it stores them.
    """

    checkpoint: str = literal(MISSING)
    model: dict[str, Any] | None = None
    target: str = MISSING
    quant: str | None = None
    plan: PlanOptions = field(default_factory=PlanOptions)
    kv: KVOptions = field(default_factory=KVOptions)

    def check(self, given: Collection[str]) -> None:
        """Find what contradicts itself before anything is loaded.

        Args:
            given: options as named on the command line.

        Raises:
            UsageError: naming the options.
        """
        if self.target not in TARGETS:
            raise UsageError(f"target={self.target} is not built yet; targets are {', '.join(TARGETS)}")
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
        if self.plan.disabled_passes:
            _check_passes(self.plan.disabled_passes)
        if self.kv.memory_gib is not None and not 0 < self.kv.memory_gib < float("inf"):
            raise UsageError(f"kv.memory_gib={self.kv.memory_gib} must be above 0")

    def open(self) -> Checkpoint:
        """The checkpoint, opened."""
        if self.checkpoint == "dummy":
            return open_checkpoint("dummy", config=self.model)
        return open_checkpoint(self.checkpoint)

    def plan_fields(self) -> dict[str, Any]:
        """Fields of :class:`makeready.graphs.compile.Request`."""
        fields = {f.name: getattr(self.plan, f.name) for f in _fields(PlanOptions)}
        fields["disabled_passes"] = tuple(self.plan.disabled_passes)
        fields["traffic"] = Traffic(**dataclasses.asdict(self.plan.traffic))
        return fields | {"target": self.target, "quant": self.quant, "kv_dtype": self.kv.dtype}

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


@dataclass
class ScaleOptions:
    """Where a file of prompts runs.

    Attributes:
        runner: local, one engine in this process; or ray, many engines on a Ray cluster (scale=ray).
        engines: engines on the cluster. null: one on each of its GPUs.
        cpus: CPU cores that Ray sets aside for an engine.
        address: of a running cluster. null: what RAY_ADDRESS names, else a cluster of this machine alone.
    """

    runner: str = MISSING
    engines: int | None = MISSING
    cpus: float = MISSING
    address: str | None = MISSING

    def check(self, given: Collection[str], prompts: str | None) -> None:
        """See :meth:`Job.check`."""
        if self.runner not in ("local", "ray"):
            raise UsageError(f"scale.runner={self.runner} is no way to run; it is local or ray")
        asked = sorted(name for name in given if name.startswith("scale."))
        if self.runner == "local" and asked:
            raise UsageError(f"{asked[0]} is for scale=ray; add that, or leave it out")
        if self.runner == "ray" and prompts is None:
            raise UsageError("scale=ray is for the rows of prompts=; a single text needs one engine")
        if (self.engines is not None and self.engines < 1) or not 0 <= self.cpus < float("inf"):
            raise UsageError(
                f"scale.engines={self.engines} must be at least 1, and scale.cpus={self.cpus:g} at least 0"
            )


@dataclass
class GenerateJob(Job):
    """Options of scripts/generate.py.

    Attributes:
        prompt: text to continue.
        chat: what a user says; answered under the model's chat template.
        prompts: file of requests: JSON lines, or Parquet by its name. A row has prompt, messages or
            token_ids, and where wanted id or custom_id (handed through), chat_template_kwargs, and
            sampling fields, bare or under sampling; or it is of OpenAI's batch format.
        output: file for the answers to prompts=, a row each in their order; JSON lines, or Parquet by its
            name. A row that cannot be served gets {"error": ...}. It appears when all rows are done;
            until then OUTPUT.partial keeps them, and the same command goes on after any interruption.
        overwrite: replace an existing output, and drop what is kept of another job.
        format: how JSON rows are written: rows, openai, or auto, which looks at the first one.
        chat_template_kwargs: further variables of the chat template, such as
            chat_template_kwargs.enable_thinking=false.
        golden: before anything else, check that the model gives the tokens that were predicted when the
            plan was compiled with golden=true.
    """

    plan: PlanOrPath = field(default_factory=PlanOrPath)  # pyright: ignore[reportIncompatibleVariableOverride]
    prompt: str | None = literal()
    chat: str | None = literal()
    prompts: str | None = literal()
    output: str | None = literal()
    overwrite: bool = False
    format: str = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    golden: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)  # type: ignore[valid-type]
    scale: ScaleOptions = field(default_factory=ScaleOptions)

    def check(self, given: Collection[str]) -> None:
        super().check(given)
        check_compiled(self.plan, given)
        asked = [name for name in ("prompt", "chat", "prompts") if getattr(self, name) is not None]
        if len(asked) != 1:
            found = (
                f"{' and '.join(f'{name}=' for name in asked)} were given together"
                if asked
                else "nothing to do"
            )
            raise UsageError(f"{found}; give one of prompt=TEXT, chat=TEXT and prompts=FILE")
        if self.prompts is None:
            self._check_single()
        elif self.output is None:
            raise UsageError("prompts= needs output=, the file that the answers are written to")
        else:
            check_files(Path(self.prompts).expanduser(), Path(self.output).expanduser())
        if self.format not in FORMATS:
            raise UsageError(f"format={self.format} is no format of rows; formats are {', '.join(FORMATS)}")
        self.scale.check(given, self.prompts)
        if self.golden and (self.plan.path is None or self.scale.runner != "local"):
            raise UsageError(
                "golden=true checks one engine against the tokens beside its plan; give plan=FOLDER, and no scale=ray"
            )
        try:
            self.params()
        except RequestError as error:
            raise UsageError(f"sampling.{error}") from None

    def _check_single(self) -> None:
        if self.output is not None or self.overwrite or self.format != "auto":
            name = "output=" if self.output is not None else "overwrite=" if self.overwrite else "format="
            raise UsageError(f"{name} is for the answers to prompts=; without it the text is printed")
        if self.prompt == "":
            raise UsageError("prompt= is empty; give at least a word")
        if self.chat_template_kwargs and self.chat is None:
            raise UsageError("chat_template_kwargs is for chat= and prompts=; a plain prompt has no template")
        for name, wanted in (("n", 1), ("return_logprob", False)):
            if getattr(self.sampling, name) != wanted:
                raise UsageError(
                    f"sampling.{name}={getattr(self.sampling, name)} does not fit a printed text; "
                    "put the prompt into a file and give prompts= and output="
                )

    def params(self) -> SamplingParams:
        """What ``sampling`` says, checked."""
        return SamplingParams.from_mapping(dataclasses.asdict(self.sampling))  # type: ignore[call-overload]


SETTLED = ("plan.", "target.", "quant.", "kv.dtype.")  # options that a compiled plan has answered


def check_compiled(plan: PlanOrPath, given: Collection[str]) -> None:
    """Refuse options, as named on the command line, that a plan which is already compiled has settled."""
    fixed = [o for o in given if o != "plan.path" and (o + ".").startswith(SETTLED)]
    if plan.path is not None and fixed:
        raise UsageError(
            f"{', '.join(sorted(fixed))} cannot be chosen beside plan={plan.path}, which is already "
            "compiled; leave it out, or leave out the plan"
        )


def check_files(prompts: Path, output: Path) -> None:
    """Hold the files of a batch job against each other before anything is read.

    Raises:
        UsageError: no file of prompts, no place for the output, or both are the same file.
    """
    if not prompts.is_file():
        raise UsageError(f"prompts={prompts} is no file; give a file with a request a row")
    if not output.parent.is_dir():
        raise UsageError(f"output={output} cannot be written: there is no folder {output.parent}")
    if output.is_dir():
        raise UsageError(f"output={output} is a folder; name a file")
    if output.exists() and output.samefile(prompts):
        raise UsageError(f"output={output} is the file of prompts; name another one")
    if output.exists() and not output.is_file():
        raise UsageError(
            f"output={output} is a device or a pipe; name a file, which can be continued and replaced"
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
    """Options of scripts/inspect.py.

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
