"""What scripts/generate.py can be told; see engine/entrypoints/options.py."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from makeready.engine.entrypoints.batch.output import Files, aside
from makeready.engine.entrypoints.options import Job, PlanOrPath, UsageError, check_compiled, literal
from makeready.engine.entrypoints.scheduler_options import SchedulerSettings, scheduler_options
from makeready.engine.errors import RequestError
from makeready.engine.generation_config import FIELDS as STATED
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import CHECKS, SamplingParams
from makeready.engine.text.formats.base import AUTO, check_parsers
from makeready.engine.text.grammar import check_grammar
from makeready.engine.text.parts import TextError

FORMATS = ("auto", "rows", "openai")  # of batch rows


# Lists of texts, and whether backslashes in them are escapes; and texts that stand as they are typed.
_TEXTS = {"stop": {"texts": True}, "stop_regex": {"texts": False}, "choice": {"texts": True}}
_TEXTS |= {name: {"literal": True} for name in ("json_schema", "regex", "ebnf", "lark", "structural_tag")}


def _sampling_options() -> type:
    """A structured config with the fields of SamplingParams, which checks what OmegaConf has no type for."""
    hints = typing.get_type_hints(SamplingParams)
    fields = [
        (
            f.name,
            _plain(_settable(f.name, hints[f.name])),
            field(default=MISSING, metadata=_TEXTS.get(f.name, {})),
        )
        for f in dataclasses.fields(SamplingParams)
    ]
    made = dataclasses.make_dataclass("SamplingOptions", fields)
    made.__doc__ = SamplingParams.__doc__
    return made


def _settable(name: str, hint: Any) -> Any:
    """null leaves a field to the model's generation_config.json."""
    return hint | None if name in STATED else hint


def _plain(hint: Any) -> Any:
    if typing.get_origin(hint) is Mapping:
        key, value = typing.get_args(hint)
        return dict[key, value]
    return hint if hint in (int, float, bool, int | None, float | None) else Any


SamplingOptions = _sampling_options()


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
        prompts: file of requests: JSON lines (also compressed by gzip, zstd, xz or bzip2), or Parquet by
            its name. A row has prompt, messages or
            token_ids, and where wanted id or custom_id (handed through), chat_template_kwargs,
            priority (higher goes first under that scheduler.policy), extra_key (rows share cached
            prefixes only with those of the same one), and sampling fields, bare or under sampling; or
            it is of OpenAI's batch format.
        output: file for the answers to prompts=, a row each in their order; JSON lines, or Parquet by its
            name. A row that cannot be served gets {"error": ...}. It appears when all rows are done;
            until then OUTPUT.partial keeps them, and the same command goes on after any interruption.
        dry_run: say how many tokens prompts= has, and which time and memory the job is predicted to take at most, and
            run and write nothing; needs no weights, no GPU and no output=.
        overwrite: replace an existing output, and drop what is kept of another job.
        weights_digest: tell weights from those that an interrupted job began with by their content, which
            reads all of them at every start; false goes by each file's size, time of change and header.
        format: how JSON rows are written: rows, openai, or auto, which looks at the first one. OpenAI rows
            without a limit generate up to 16 tokens as completions and up to the context as chats, unless
            sampling.max_new_tokens is given; or fewer, where the model's generation_config.json says so.
        carry: hand columns of rows that are no fields through to their answers; false refuses them.
        chat_template: jinja template to use in place of the model's: a file, the text itself, or the name of one of
            several that the model has.
        tool_call_parser: how the model writes tool calls, in answers to rows of prompts= that bring tools:
            deepseekv3, deepseekv31, gpt-oss, llama3, mistral, pythonic, qwen or qwen3_coder. auto: as its chat
            template tells; none: calls stay in the text.
        reasoning_parser: how it writes reasoning, in answers to rows of messages: think (<think> ... </think>),
            gpt-oss or mistral. auto: as its chat template tells; none: reasoning stays in the content.
        add_special_tokens: put bos (and eos) around prompts that are texts where the tokenizer does; false for
            texts that have them. Rows may say otherwise.
        generation_config: sampling values that are null are those of the model's generation_config.json, where it
            has them: temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens. Without it, or with
            false: 1.0, -1, 1.0, 0.0, 1.0, 128.
        chat_template_kwargs: further variables of the chat template, such as
            chat_template_kwargs.enable_thinking=false.
        golden: before anything else, check that the model gives the tokens that were predicted when the
            plan was compiled with golden=true.
        metrics: file for the engine's figures since this start, in Prometheus' text format; replaced
            whole, every few seconds and at the end.
        trace: file for a time line of the steps since this start, which https://ui.perfetto.dev opens;
            about 1 kB a step.
    """

    plan: PlanOrPath = field(default_factory=PlanOrPath)  # pyright: ignore[reportIncompatibleVariableOverride]
    prompt: str | None = literal()
    chat: str | None = literal()
    prompts: str | None = literal()
    output: str | None = literal()
    dry_run: bool = False
    overwrite: bool = False
    weights_digest: bool = False
    format: str = "auto"
    carry: bool = True
    chat_template: str | None = literal()
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    add_special_tokens: bool = True
    generation_config: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    golden: bool = False
    sampling: SamplingOptions = field(default_factory=SamplingOptions)  # type: ignore[valid-type]
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)  # type: ignore[valid-type]
    scale: ScaleOptions = field(default_factory=ScaleOptions)
    metrics: str | None = literal()
    trace: str | None = literal()

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
        elif self.dry_run and self.output is None:
            check_prompts(Path(self.prompts).expanduser())
        elif self.output is None:
            raise UsageError("prompts= needs output=, the file that the answers are written to")
        else:
            check_files(Path(self.prompts).expanduser(), Path(self.output).expanduser())
        if self.format not in FORMATS:
            raise UsageError(f"format={self.format} is no format of rows; formats are {', '.join(FORMATS)}")
        self.scale.check(given, self.prompts)
        if self.dry_run and self.scale.runner != "local":
            raise UsageError(
                "dry_run=true predicts one engine; leave out scale=ray and divide the time by engines"
            )
        if self.scheduling().max_queued_requests is not None:
            raise UsageError(
                "scheduler.max_queued_requests is for a server, which refuses what it cannot queue; rows of a "
                "file wait for their turn, so leave it out"
            )
        self._check_watch()
        if self.golden and (self.plan.path is None or self.scale.runner != "local"):
            raise UsageError(
                "golden=true checks one engine against the tokens beside its plan; give plan=FOLDER, and no scale=ray"
            )
        try:
            check_parsers(self.tool_call_parser, self.reasoning_parser)
        except TextError as error:
            raise UsageError(str(error)) from None
        try:
            asked = self.params().grammar
            if asked is not None:
                check_grammar(*asked)
        except RequestError as error:
            raise UsageError(f"sampling.{error}") from None

    def _check_single(self) -> None:
        if self.dry_run:
            raise UsageError(
                "dry_run=true is for a job over prompts=; scripts/predict.py predicts single texts"
            )
        if self.output is not None or self.overwrite or self.weights_digest or self.format != "auto":
            flags = {"output=": self.output is not None, "overwrite=": self.overwrite}
            flags |= {"weights_digest=": self.weights_digest, "format=": True}
            name = next(name for name, given in flags.items() if given)
            raise UsageError(f"{name} is for the answers to prompts=; without it the text is printed")
        if self.prompt == "":
            raise UsageError("prompt= is empty; give at least a word")
        if self.chat_template_kwargs and self.chat is None:
            raise UsageError("chat_template_kwargs is for chat= and prompts=; a plain prompt has no template")
        if self.chat_template is not None and self.chat is None:
            raise UsageError("chat_template= is for chat= and prompts=; a plain prompt has no template")
        for name in ("tool_call_parser", "reasoning_parser"):
            if getattr(self, name) != AUTO:
                raise UsageError(
                    f"{name}= is for the answers to prompts=; a printed text is all that was written"
                )
        for name, wanted in (("n", 1), ("return_logprob", False)):
            if getattr(self.sampling, name) != wanted:
                raise UsageError(
                    f"sampling.{name}={getattr(self.sampling, name)} does not fit a printed text; "
                    "put the prompt into a file and give prompts= and output="
                )

    def _check_watch(self) -> None:
        """Whether the files that tell of the engine have a place, and one of their own."""
        named = {name: getattr(self, name) for name in ("metrics", "trace")}
        paths = {name: Path(value).expanduser() for name, value in named.items() if value is not None}
        if paths and self.scale.runner != "local":
            raise UsageError(
                f"{next(iter(paths))}= tells of the engine in this process, and scale=ray has none here; "
                "leave out one of them"
            )
        for name, path in paths.items():
            check_place(name, path)
        read = {name: getattr(self, name) for name in ("prompts", "checkpoint")}
        files: dict[str, Sequence[Path]] = {
            name: (Path(path).expanduser(),) for name, path in read.items() if path is not None
        }
        if self.output is not None:
            output = Path(self.output).expanduser()
            files["output"] = (output, *Files(output).own)
        for name, path in paths.items():
            files[name] = (path, aside(path)) if name == "metrics" else (path,)
        check_apart(files)

    def plan_fields(self) -> dict[str, Any]:
        """See :meth:`Job.plan_fields`; a deterministic scheduler's plan is compiled to be so."""
        fields = super().plan_fields()
        return fields | {"deterministic": self.plan.deterministic or self.scheduler.deterministic}

    def scheduling(self) -> SchedulerOptions:
        """What ``scheduler`` says, checked."""
        return scheduler_options(self.scheduler)

    def params(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """What ``sampling`` says, checked; ``defaults`` stand in for fields that it leaves to the model."""
        asked = dataclasses.asdict(self.sampling)  # type: ignore[call-overload]
        given = {name: value for name, value in asked.items() if value is not None or name not in STATED}
        return SamplingParams.from_mapping({**(defaults or {}), **given})

    def fits(self, defaults: Mapping[str, Any]) -> bool:
        """Whether the model alone says how many tokens are generated at most."""
        return self._limitless and "max_new_tokens" in defaults

    def row_fields(self, format: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling fields of rows that do not say otherwise; ``defaults`` as for :meth:`params`.

        Without ``max_new_tokens`` where neither the job nor the model says it and the format has a limit of its own.
        """
        params = self.params(defaults)
        fields = {name: getattr(params, name) for name in CHECKS}
        if format == "openai" and self._limitless and not self.fits(defaults):
            del fields["max_new_tokens"]
        return fields

    def row_limit(self, format: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """What a job's identity says of a limit of tokens that the job does not set itself.

        None, which no job sets: rows end otherwise under the same figure, where somebody asks for it.
        """
        if not self._limitless or (format != "openai" and not self.fits(defaults)):
            return {}
        stated = defaults.get("max_new_tokens")
        return {"sampling.max_new_tokens": None, "generation_config.max_new_tokens": stated}

    @property
    def _limitless(self) -> bool:
        return self.sampling.max_new_tokens is None  # type: ignore[attr-defined]


def check_prompts(prompts: Path) -> None:
    """Whether there is a file of prompts; raises :class:`UsageError`."""
    if not prompts.is_file():
        raise UsageError(f"prompts={prompts} is no file; give a file with a request a row")


def check_files(prompts: Path, output: Path) -> None:
    """Hold the files of a batch job against each other before anything is read.

    Raises:
        UsageError: no file of prompts, no place for the output, or both are the same file.
    """
    check_prompts(prompts)
    if output.exists() and output.samefile(prompts):
        raise UsageError(f"output={output} is the file of prompts; name another one")
    check_place("output", output)


def check_apart(files: Mapping[str, Sequence[Path]]) -> None:
    """Whether no option's file is another's.

    Args:
        files: option → the file that it names, and those that are written beside that.

    Raises:
        UsageError: naming both options.
    """
    taken: dict[Path, str] = {}
    for name, paths in files.items():
        for path in paths:
            other = taken.setdefault(path.resolve(), name)
            if other == name:
                continue
            named = f"{name}={paths[0]}"
            if path != paths[0]:
                raise UsageError(f"{named} also writes {path}, the file of {other}=; name another one")
            same = path.resolve() == files[other][0].resolve()
            whose = f"the file of {other}= too" if same else f"a file that {other}= writes too"
            raise UsageError(f"{named} is {whose}; name another one")


def check_place(name: str, path: Path) -> None:
    """Whether a file can be made and replaced there; raises :class:`UsageError` with the option's name."""
    if not path.parent.is_dir():
        raise UsageError(f"{name}={path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{name}={path} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{name}={path} is a device or a pipe; name a file, which can be replaced")
