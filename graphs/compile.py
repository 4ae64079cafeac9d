"""From a checkpoint to a plan, in stages that can each be printed, costed and measured.

trace_checkpoint(...) → Traced ─ lower() → Lowered ─ compile() → Plan
compile_plan(...) does all of it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from makeready.graphs import memory
from makeready.graphs.buckets import Traffic, choose_buckets, prove_coverage
from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.codec import to_json
from makeready.graphs.cost import Cost, StepTime, program_cost
from makeready.graphs.ir import Program
from makeready.graphs.lower import lower, place_weights
from makeready.graphs.models import family
from makeready.graphs.passes import rewrite
from makeready.graphs.passes.specialize import specialize
from makeready.graphs.plan import LOAD, SCHEMA, LoweredProgram, Memory, Options, Plan, PlanError
from makeready.graphs.plan_cache import cache_folder
from makeready.graphs.quant.fp8 import FP8, quantize_linears
from makeready.graphs.quant.loading import loading_of
from makeready.graphs.quant.scheme import ON_LOAD, Scheme
from makeready.graphs.quant.stored import stored_scheme
from makeready.graphs.recipe import Param
from makeready.graphs.spec import PHASES, Bucket, KVSpec, Limits, result_fields, slot_fields, step_fields
from makeready.graphs.targets import Target, find_target
from makeready.graphs.tokenizer_reference import tokenizer_reference
from makeready.graphs.trace import trace
from makeready.graphs.verify import verify
from makeready.kernels import registry
from makeready.kernels.spec import DTYPE_BYTES

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
CUDA_ACTIVATION_DTYPES = ("bfloat16", "float16")  # what attention kernels multiply
FP8_CACHE = {"float8_e4m3fn": "float8_e4m3fn", "float8_e4m3": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What a plan is asked for; None leaves the choice to the model or the target.

    Attributes:
        target: a name of graphs/targets.py.
        max_rows, max_tokens, context_len, page_size: see :class:`~makeready.graphs.spec.Limits`.
        weight_dtype: ``float32``, ``bfloat16`` or ``float16``; None takes the activations' on CUDA, else
            the checkpoint's, fp16 for GGUF blocks.
        activation_dtype: between kernels: ``bfloat16`` or ``float16`` on CUDA, ``float32`` on the CPU; None
            takes the target's. fp16 is eight times as fine as bf16 and overflows at 65,504.
        quant: ``fp8`` (a scale for each output and each token) or ``fp8_block`` (for each 128 by 128 weights
            and each token's 128 inputs) quantizes the linears of a wide checkpoint when it is loaded; None
            computes as the checkpoint stores them.
        kv_dtype: dtype of the cache, ``float8_e4m3fn`` (or ``fp8_e4m3``) among them; None takes the
            activations'.
        disabled_passes: rewrites to leave out.
        max_decode_buckets, max_extend_buckets: bounds on the number of programs.
        candidates: at most so many ways to run a call are compiled, for scripts/tune to choose from.
        traffic: expected batches.
    """

    target: str = "cpu"
    max_rows: int = 8
    max_tokens: int | None = None
    context_len: int | None = None
    page_size: int | None = None
    weight_dtype: str | None = None
    activation_dtype: str | None = None
    quant: str | None = None
    kv_dtype: str | None = None
    disabled_passes: tuple[str, ...] = ()
    max_decode_buckets: int = 16
    max_extend_buckets: int = 24
    candidates: int = 1
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True)
class Traced:
    """The model's step as one general program: quantized as asked, before any rewrite that keeps numbers."""

    program: Program
    checkpoint: Checkpoint
    target: Target
    limits: Limits
    options: Options
    kv: KVSpec
    traffic: Traffic

    def as_text(self) -> str:
        """The program, one line a call."""
        return self.program.as_text()

    def lower(self) -> Lowered:
        """Make each phase's program and rewrite it."""
        programs = {}
        for phase in PHASES:
            special = verify(specialize(self.program, phase), after="specialize")
            programs[phase] = rewrite(
                special, disabled=self.options.disabled_passes, cuda=self.target.is_cuda
            )
        return Lowered(self, programs)


@dataclass(frozen=True)
class Lowered:
    """A rewritten program for every phase."""

    traced: Traced
    programs: Mapping[str, Program]

    def as_text(self) -> str:
        """All programs, one line a call."""
        return "\n\n".join(program.as_text() for program in self.programs.values())

    def cost_analysis(self, bucket: Bucket) -> Cost:
        """Bytes, operations and roofline seconds of one step in ``bucket``."""
        t = self.traced
        return program_cost(self.programs[bucket.phase], bucket, t.traffic.context, t.target)

    def compile(self, progress: Progress = lambda stage: None) -> Plan:
        """Choose buckets and kernels, place every byte, and prove coverage.

        Raises:
            PlanError: a batch has no bucket, or an op no kernel on the target that passes its checks.
        """
        t = self.traced
        context = min(t.traffic.context, t.limits.context_len)
        buckets = choose_buckets(
            t.limits,
            t.traffic,
            {phase: StepTime(program, t.target, context) for phase, program in self.programs.items()},
            max_decode=t.options.max_decode_buckets,
            max_extend=t.options.max_extend_buckets,
            row_counts=t.target.row_counts,
        )
        prove_coverage(buckets, t.limits)
        stored: dict[bytes, Param] = {}
        programs: dict[str, LoweredProgram] = {}
        arena = 0
        for phase, program in self.programs.items():
            largest = max((b for b in buckets if b.phase == phase), key=lambda b: (b.tokens, b.rows))
            programs[phase], nbytes = lower(program, t.target, largest, stored)
            arena = max(arena, nbytes)
        weights, weight_bytes = place_weights(list(stored.values()))
        loading = loading_of(weights) if t.target.is_cuda else None
        if loading is not None:
            arena = max(arena, loading.slots * loading.slot_bytes)
        checkpoint = t.checkpoint
        plan = Plan(
            schema=SCHEMA,
            target=t.target.name,
            architecture=checkpoint.config["architectures"][0],
            checkpoint=checkpoint.fingerprint(),
            tokenizer=tokenizer_reference(checkpoint),
            config=checkpoint.config,
            limits=t.limits,
            options=t.options,
            kv=t.kv,
            buckets=buckets,
            memory=_memory(t.limits, weight_bytes, arena),
            weights=weights,
            programs=programs,
            loading=loading,
        )
        return _with_kernels(plan, t.target, context, progress) if t.target.is_cuda else plan


def _with_kernels(plan: Plan, target: Target, context: int, progress: Progress) -> Plan:
    """``plan`` with what its launches run on a GPU."""
    from makeready.graphs.cuda.emit import emit  # imports triton

    programs, buckets, loading = dict(plan.programs), plan.buckets, plan.loading
    if loading is not None:
        programs[LOAD.phase], buckets = loading.program, (*buckets, LOAD)
    emitted = emit(
        programs,
        plan.specs,
        buckets,
        target,
        context=context,
        keep=plan.options.candidates,
        cache=cache_folder() / "kernels",
        progress=lambda done, total: progress(f"compile kernels {done}/{total}"),
    )
    programs = dict(emitted.programs)
    if loading is not None:
        loading = replace(loading, program=_without_scratch(programs.pop(LOAD.phase)))
    return replace(
        plan,
        programs=programs,
        loading=loading,
        binaries=emitted.binaries,
        cubins=emitted.cubins,
        dropped=emitted.dropped,
        memory=replace(plan.memory, scratch=emitted.scratch, arena=max(plan.memory.arena, emitted.arena)),
    )


def _without_scratch(program: LoweredProgram) -> LoweredProgram:
    """``program`` if its kernels may run at once in different slots.

    Raises:
        PlanError: one of them has scratch, which all kernels of a plan share.
    """
    choices = (c for one in program.classes for ways in one.candidates.values() for c in ways)
    for choice in choices:
        if any(argument.kind == "scratch" for node in choice.nodes for argument in node.arguments):
            raise PlanError(
                f"{choice.name} uses scratch, which kernels that run while weights are loaded cannot have"
            )
    return program


def _discover(target: Target) -> None:
    """Register all kernels for ``target``.

    Raises:
        PlanError: the target needs Triton, which is not installed.
    """
    try:
        registry.discover(target.name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise PlanError(f"a plan for {target.name} needs Triton: pip install triton==3.6.0") from None


def trace_checkpoint(checkpoint: Checkpoint | str | Path, request: Request) -> Traced:
    """Trace the model that ``checkpoint`` holds under what ``request`` asks for.

    Raises:
        PlanError: a limit is not positive or beyond what the model allows.
        UnsupportedModelError, CheckpointError: the checkpoint cannot be planned for.
    """
    target = find_target(request.target)
    _discover(target)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    model_config = family.read_config(checkpoint.config)
    limits = _limits(request, target, _longest_context(model_config.rope, model_config.context_len))
    activation = request.activation_dtype or target.activation_dtype
    allowed = CUDA_ACTIVATION_DTYPES if target.is_cuda else (target.activation_dtype,)
    _known("plan.activation_dtype", activation, allowed)
    weight_dtype = request.weight_dtype or (activation if target.is_cuda else _stored_dtype(checkpoint))
    _known("plan.weight_dtype", weight_dtype, WEIGHT_DTYPES)
    if request.candidates < 1:
        raise PlanError(f"plan.candidates={request.candidates} must be a whole number of at least 1")
    kv_dtype = _kv_dtype(request, target, activation)
    scheme = _scheme(request, target, checkpoint)
    model = family.build(checkpoint.config, context_len=limits.context_len, activation=activation)
    kv = KVSpec(limits.page_size, model.kv_parts(limits.page_size, kv_dtype))
    program = trace(model, limits, kv_parts=kv.parts, weight_dtype=weight_dtype, vector_dtype=activation)
    program = verify(program, after="trace")
    if scheme is not None:
        program = verify(quantize_linears(program, scheme), after="quantize_linears")
    _check_sources(program.params.values(), checkpoint)
    options = Options(
        weight_dtype=weight_dtype,
        activation_dtype=activation,
        kv_dtype=kv_dtype,
        quant=request.quant,
        disabled_passes=tuple(sorted(set(request.disabled_passes))),
        max_decode_buckets=request.max_decode_buckets,
        max_extend_buckets=request.max_extend_buckets,
        candidates=request.candidates,
        traffic=to_json(request.traffic),
    )
    return Traced(program, checkpoint, target, limits, options, kv, request.traffic)


def compile_plan(
    checkpoint: Checkpoint | str | Path,
    request: Request | None = None,
    *,
    progress: Progress = lambda stage: None,
    **fields: Any,
) -> Plan:
    """Trace, lower and compile: ``compile_plan(path, target="cpu", max_rows=8)``.

    Args:
        checkpoint: a checkpoint, or the path of one.
        request: what to ask for; ``fields`` of :class:`Request` may be given instead or on top.
        progress: called with the name of each stage as it begins, for kernels with how many are compiled.
    """
    request = replace(request or Request(), **fields)
    progress("trace")
    traced = trace_checkpoint(checkpoint, request)
    progress("lower")
    lowered = traced.lower()
    progress("compile")
    return lowered.compile(progress)


def _limits(request: Request, target: Target, longest: int) -> Limits:
    for name in (
        *("max_rows", "max_tokens", "context_len", "page_size"),
        *("max_decode_buckets", "max_extend_buckets"),
    ):
        asked = getattr(request, name)
        if asked is not None and (type(asked) is not int or asked < 1):
            raise PlanError(f"plan.{name}={asked} must be a whole number of at least 1")
    context = request.context_len or longest
    if context > longest:
        raise PlanError(
            f"plan.context_len={context} is beyond the {longest} tokens that the model's positions allow; "
            f"lower it to {longest}"
        )
    return Limits(
        max_rows=request.max_rows,
        max_tokens=request.max_tokens or max(target.max_tokens, request.max_rows),
        context_len=context,
        page_size=request.page_size or target.page_size,
    )


def _longest_context(rope: Mapping[str, Any], positions: int) -> int:
    """Dynamic scaling goes beyond the config's positions, by its factor."""
    return int(positions * rope["factor"]) if rope["rope_type"] == "dynamic" else positions


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The config's dtype; fp16 for block-quantized files, whose values are products of fp16 scales."""
    if any(info.dtype not in DTYPE_BYTES for info in checkpoint.tensors.values()):
        return "float16"
    return checkpoint.config.get("dtype") or "bfloat16"


def _known(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise PlanError(f"{name}={value} is not supported; choose one of {', '.join(allowed)}")


def _kv_dtype(request: Request, target: Target, activation: str) -> str:
    """The cache's dtype.

    Raises:
        PlanError: it is unknown, or the target has no 8-bit floats.
    """
    asked = request.kv_dtype or activation
    _known("kv.dtype", asked, (*WEIGHT_DTYPES, *FP8_CACHE))
    if asked in FP8_CACHE:
        _needs_fp8(target, f"kv.dtype={asked}")
    return FP8_CACHE.get(asked, asked)


def _scheme(request: Request, target: Target, checkpoint: Checkpoint) -> Scheme | None:
    """How linears are quantized, in the checkpoint or when it is loaded; None where they are not.

    Raises:
        PlanError: an unknown scheme, a target without 8-bit floats, or both a stored one and one asked for.
        UnsupportedModelError: the checkpoint stores something else.
    """
    stored = stored_scheme(checkpoint.config)
    if request.quant is None:
        if stored is not None:
            _needs_fp8(target, "this quantized checkpoint")
        return stored
    _known("quant", request.quant, ON_LOAD)
    if stored is not None:
        raise PlanError(
            f"quant={request.quant} was asked for, but {checkpoint.path} is quantized already; "
            "leave quant out to run it as it is"
        )
    _needs_fp8(target, f"quant={request.quant}")
    return ON_LOAD[request.quant]


def _needs_fp8(target: Target, what: str) -> None:
    if target.is_cuda and "fp8" not in target.features:
        raise PlanError(
            f"{what} needs 8-bit floats, which {target.name} does not compute with; "
            "choose a target from sm_90a on, or 16-bit weights and cache"
        )


def _check_sources(params: Collection[Param], checkpoint: Checkpoint) -> None:
    """Every parameter's source exists in the checkpoint, in the shape that the config implies."""
    sources = [(param, piece) for param in params for piece in param.pieces]
    if checkpoint.format == "dummy":
        shapes = {piece.source: param.source_shape(piece) for param, piece in sources}
        checkpoint.declare(shapes)  # type: ignore[attr-defined]
    for param, piece in sources:
        source, shape = piece.source, param.source_shape(piece)
        info = checkpoint.tensors.get(source)
        if info is None:
            raise PlanError(f"the checkpoint {checkpoint.path} lacks the tensor {source}; is it complete?")
        if not param.fits(piece, info.shape) or (not piece.repeated and info.shape[0] != shape[0]):
            raise PlanError(
                f"tensor {source} of {checkpoint.path} is {list(info.shape)}, the config implies {list(shape)}; "
                "config.json belongs to another checkpoint"
            )
        if (info.dtype == FP8) != (param.assembled.dtype == FP8):
            raise PlanError(
                f"tensor {source} of {checkpoint.path} is {info.dtype}, its quantization_config implies "
                f"{'' if param.assembled.dtype == FP8 else 'no '}{FP8}; config.json belongs to another checkpoint"
            )


def _memory(limits: Limits, weights: int, arena: int) -> Memory:
    sizes = {"R": limits.max_rows, "T": limits.max_tokens}
    step, slot, result = (
        memory.layout(fields(limits), sizes)[1] for fields in (step_fields, slot_fields, result_fields)
    )
    return Memory(weights=weights, arena=arena, step=step, slot=slot, result=result)
