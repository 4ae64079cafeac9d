"""What scripts/bench.py can be told; see engine/entrypoints/options.py."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import MISSING

from makeready.engine.entrypoints.options import Job, PlanOrPath, UsageError, check_compiled, literal
from makeready.engine.entrypoints.scheduler_options import SchedulerSettings, scheduler_options

# The options that each suite reads, beside checkpoint, suite and output. A name ends with a dot where it
# stands for a group.
_LLM = ("model.", "target", "device", "quant", "plan.", "kv.", "speculative.", "scheduler.", "threads")
SUITES: dict[str, tuple[str, ...]] = {
    "decode": ("rows", "tokens", "repeats", "weight_dtype", "threads"),
    "startup": ("repeats", "weight_dtype", "threads"),
    "llama_cpp": ("tokens", "repeats", "threads"),
    "latency": (*_LLM, "rows", "tokens", "repeats", "latency."),
    "constrained": (*_LLM, "rows", "tokens", "repeats", "constrained."),
    "throughput": (*_LLM, "throughput.", "trace"),
    "replay": (*_LLM, "replay.", "trace"),
    "prefix": (*_LLM, "replay.", "prefix.", "trace"),
    "host": ("host.", "scheduler."),
    "buckets": (*_LLM, "repeats", "latency.", "buckets."),
    "load": ("model.", "plan.", "repeats"),
    "load_steps": ("plan.path", "load_steps."),
    "gemm": (),
    "gemm_sweep": (),
    "gemm_fp8": ("gemm_fp8.",),
    "gemm_fp8_sweep": ("gemm_fp8.",),
    "gemm_int4": (),
    "gemm_int4_sweep": (),
    "gemm_few": ("gemm_few.",),
    "attention": ("attention.",),
    "attention_sweep": ("attention.",),
    "small_ops": (),
    "quantize_fp8": (),
    "sample": (),
    "moe": (),
}
_SHARING = {name for name, options in SUITES.items() if set(_LLM) <= set(options)}
_MODEL = {"decode", "startup", "llama_cpp", "load"} | _SHARING
FP8_SCALES = ("rows", "groups", "integers")
FP8_MATRICES = ("qkv", "o", "gate_up", "down")
FEW_KINDS = ("bf16", "rows", "groups", "int4", "w8a16", "q4_k", "q6_k")
FEW_MOST = 64
ATTENTION_PARTS = ("decode", "extend", "write", "latent")


@dataclass
class LatencyOptions:
    """The time between tokens and to the first one.

    Attributes:
        context: prompt tokens a row for the time between tokens.
        prompts: lengths of single prompts for the time to the first token.
    """

    context: int = MISSING
    prompts: list[int] = MISSING


@dataclass
class ThroughputOptions:
    """Offline throughput over random prompts.

    Attributes:
        prompts: how many.
        input: most tokens of a prompt.
        output: most tokens generated for one.
        ratio: lengths are drawn evenly from ratio times the most up to the most; 1 makes all equal.
        seed: of lengths and token ids.
    """

    prompts: int = MISSING
    input: int = MISSING
    output: int = MISSING
    ratio: float = MISSING
    seed: int = MISSING


@dataclass
class ReplayOptions:
    """A recorded load.

    Attributes:
        trace: CSV with arrival time, prompt and output tokens (as the Azure traces have them), or JSON lines
            with timestamp in ms, input_length, output_length and where known hash_ids (as Mooncake's have
            them); equal ids become equal tokens, so shared prefixes are shared.
        requests: only the first so many. null: all.
        speed: how many times faster than recorded requests arrive.
        block: tokens that one of hash_ids stands for.
        seed: of token ids.
    """

    trace: str | None = literal()
    requests: int | None = MISSING
    speed: float = MISSING
    block: int = MISSING
    seed: int = MISSING


@dataclass
class PrefixOptions:
    """Groups of prompts that begin alike, for the prefix suite where replay.trace is null.

    Attributes:
        groups: how many.
        prompts: in each.
        shared: tokens that a group's prompts begin with.
        own: tokens that follow, different in each.
        output: tokens generated for each.
        seed: of token ids and of the order of prompts.
    """

    groups: int = MISSING
    prompts: int = MISSING
    shared: int = MISSING
    own: int = MISSING
    output: int = MISSING
    seed: int = MISSING


@dataclass
class HostOptions:
    """The engine's own cost, on an executable that takes no time.

    Attributes:
        rows: requests that run at once.
        waiting: requests that wait beside them.
        context: prompt tokens of each.
        steps: decode steps of a measurement.
        repeats: measurements of each; the least counts most on a shared machine.
    """

    rows: list[int] = MISSING
    waiting: list[int] = MISSING
    context: int = MISSING
    steps: int = MISSING
    repeats: int = MISSING


@dataclass
class BucketsOptions:
    """Full steps of buckets.

    Attributes:
        only: buckets to measure, such as decode-64 and extend-256x1024. null: all.
        seconds: for which a step is replayed in one measurement, at least. A GPU that comes to the limit of its power
            lowers its clocks after some tens of milliseconds.
        svg: file for a picture of the steps, cut into their parts, above their floors.
    """

    only: list[str] | None = MISSING
    seconds: float = MISSING
    svg: str | None = literal()


@dataclass
class ConstrainedOptions:
    """Outputs that follow a grammar, beside others.

    Attributes:
        context: prompt tokens a row.
        tokenizer: folder of a tokenizer.json for checkpoint=dummy. null: the checkpoint's own.
    """

    context: int = MISSING
    tokenizer: str | None = literal()


@dataclass
class LoadStepsOptions:
    """What loading consists of.

    Attributes:
        weights: folder for the random weights that are written first, as large as the plan's checkpoint;
            what is in its config.json and model.safetensors is lost. null: a temporary one.
    """

    weights: str | None = literal()


@dataclass
class GemmFp8Options:
    """Which 8-bit projections.

    Attributes:
        scales: some of rows (floats with a scale a token and an output), groups (a scale for 128 inputs and for 128 x
            128 weights) and integers (int8 by rows).
        matrices: some of qkv, o, gate_up and down.
    """

    scales: list[str] = MISSING
    matrices: list[str] = MISSING


@dataclass
class GemmFewOptions:
    """Which projections of few tokens.

    Attributes:
        kinds: some of bf16, rows and groups (8-bit floats with scales of rows or of squares), and of weights alone
            int4, w8a16 (8 bits), q4_k and q6_k (GGUF's blocks).
        tokens: numbers of tokens, at most 64.
    """

    kinds: list[str] = MISSING
    tokens: list[int] = MISSING


@dataclass
class AttentionOptions:
    """Which attention.

    Attributes:
        parts: some of decode and extend (steps over the paged cache), write (what fills it; not swept) and latent
            (DeepSeek's; not swept).
    """

    parts: list[str] = MISSING


@dataclass
class BenchJob(Job):
    """Options of scripts/bench.py.

    Attributes:
        checkpoint: a Hugging Face folder, a .gguf file, or dummy: random weights of the model= preset; not
            for suites of no model: host, load_steps and those of kernels alone.
        suite: what to measure, one or several; --help says what each is.
        rows: batch sizes of the decode, latency and constrained suites.
        tokens: decode steps of one measurement there.
        repeats: measurements of each kind; the median is what counts.
        weight_dtype: float32, bfloat16 or float16, in both engines of the decode suite.
        threads: threads of PyTorch, where it computes. null: one a core.
        trace: file for a time line of the steps of throughput, replay and prefix; Perfetto opens it.
        output: JSON file for the result.
    """

    checkpoint: str | None = literal()  # pyright: ignore[reportIncompatibleVariableOverride]
    plan: PlanOrPath = field(default_factory=PlanOrPath)  # pyright: ignore[reportIncompatibleVariableOverride]
    suite: list[str] = MISSING
    rows: list[int] = MISSING
    tokens: int = MISSING
    repeats: int = MISSING
    weight_dtype: str = MISSING
    threads: int | None = MISSING
    latency: LatencyOptions = field(default_factory=LatencyOptions)
    constrained: ConstrainedOptions = field(default_factory=ConstrainedOptions)
    throughput: ThroughputOptions = field(default_factory=ThroughputOptions)
    replay: ReplayOptions = field(default_factory=ReplayOptions)
    prefix: PrefixOptions = field(default_factory=PrefixOptions)
    host: HostOptions = field(default_factory=HostOptions)
    buckets: BucketsOptions = field(default_factory=BucketsOptions)
    load_steps: LoadStepsOptions = field(default_factory=LoadStepsOptions)
    gemm_fp8: GemmFp8Options = field(default_factory=GemmFp8Options)
    gemm_few: GemmFewOptions = field(default_factory=GemmFewOptions)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)  # type: ignore[valid-type]
    trace: str | None = literal()
    output: str | None = literal()

    def check(self, given: Collection[str]) -> None:
        """See :meth:`Job.check`."""
        unknown = [name for name in self.suite if name not in SUITES]
        if unknown or not self.suite:
            raise UsageError(f"suite={self.suite} must list some of {', '.join(SUITES)}")
        read = {option for name in self.suite for option in SUITES[name]} | {"suite", "output", "checkpoint"}
        unread = sorted(name for name in given if not any(_is(name, option) for option in read))
        if unread:
            readers = [n for n, options in SUITES.items() if any(_is(unread[0], o) for o in options)]
            raise UsageError(
                f"{unread[0]}= is not read by suite={','.join(self.suite)}; "
                f"it is for {', '.join(readers)}; leave it out or add its suite"
            )
        if not _MODEL.isdisjoint(self.suite):
            self._check_checkpoint(given)
        self._check_figures()
        self._check_names()
        scheduler_options(self.scheduler)
        if "prefix" in self.suite:
            if "scheduler.prefix_cache" in given:
                raise UsageError("suite prefix runs with scheduler.prefix_cache both ways; leave it out")
            scheduler_options(self.scheduler, prefix_cache=False)
        if self.constrained.tokenizer is not None and self.checkpoint != "dummy":
            raise UsageError("constrained.tokenizer= is for checkpoint=dummy; a checkpoint has its own")
        if "replay" in self.suite and self.replay.trace is None:
            raise UsageError("suite replay needs replay.trace=FILE, a recorded load as CSV or JSON lines")
        if self.replay.trace is not None and not Path(self.replay.trace).expanduser().is_file():
            raise UsageError(f"replay.trace={self.replay.trace} is no file; give a recorded load")

    def _check_checkpoint(self, given: Collection[str]) -> None:
        if self.checkpoint is None:
            raise UsageError("checkpoint= is missing: a Hugging Face folder, a .gguf file, or dummy")
        beside = sorted({"decode", "startup", "llama_cpp"}.intersection(self.suite))
        if beside and self.checkpoint == "dummy":
            raise UsageError(f"suite {beside[0]} reads real weights; give a checkpoint, or leave it out")
        super().check(given)
        check_compiled(self.plan, given)

    def _check_names(self) -> None:
        """Whether there is what lists name."""
        for name, given, known in (
            ("gemm_fp8.scales", self.gemm_fp8.scales, FP8_SCALES),
            ("gemm_fp8.matrices", self.gemm_fp8.matrices, FP8_MATRICES),
            ("gemm_few.kinds", self.gemm_few.kinds, FEW_KINDS),
            ("attention.parts", self.attention.parts, ATTENTION_PARTS),
        ):
            if not given or not set(given) <= set(known):
                raise UsageError(f"{name}={given} must list some of {', '.join(known)}")
        if "attention_sweep" in self.suite and not {"decode", "extend"}.intersection(self.attention.parts):
            raise UsageError(
                "suite attention_sweep has no cases but decode and extend; add one to attention.parts"
            )

    def _check_figures(self) -> None:
        """Whether all counts are counts."""
        counts = {
            "rows": self.rows,
            "tokens": [self.tokens],
            "repeats": [self.repeats],
            "threads": [self.threads or 1],
            "latency.context": [self.latency.context],
            "latency.prompts": self.latency.prompts,
            "constrained.context": [self.constrained.context],
            "gemm_few.tokens": self.gemm_few.tokens,
            "replay.requests": [1 if self.replay.requests is None else self.replay.requests],
            "replay.block": [self.replay.block],
            "host.waiting": [1 + least for least in self.host.waiting],
        }
        for group in ("throughput", "prefix", "host"):
            for f in fields(getattr(self, group)):
                value = getattr(getattr(self, group), f.name)
                if f.name not in ("ratio", "seed", "waiting"):
                    counts[f"{group}.{f.name}"] = value if isinstance(value, list) else [value]
        for name, values in counts.items():
            if min(values, default=0) < 1:
                raise UsageError(f"{name} must be at least {int(name != 'host.waiting')}")
        if max(self.gemm_few.tokens) > FEW_MOST:
            raise UsageError(f"gemm_few.tokens={self.gemm_few.tokens} must be at most {FEW_MOST}")
        if not 0 <= self.throughput.ratio <= 1:
            raise UsageError(f"throughput.ratio={self.throughput.ratio:g} must be from 0 to 1")
        if not 0 < self.replay.speed < float("inf"):
            raise UsageError(f"replay.speed={self.replay.speed:g} must be above 0")
        if not 0 < self.buckets.seconds < float("inf"):
            raise UsageError(f"buckets.seconds={self.buckets.seconds:g} must be above 0")


def shares_model(suite: str) -> bool:
    """Whether the suite runs on the one model that suites share, and not in processes or on models of its own."""
    return suite in _SHARING


def _is(name: str, option: str) -> bool:
    """Whether ``name``, as given on the command line, is the option or one of the group."""
    name = name.rpartition("@")[2]  # a preset, chosen for another place than its own
    return name == option or (option.endswith(".") and (name + ".").startswith(option))
