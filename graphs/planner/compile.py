"""From a checkpoint to a plan, in stages that can each be printed, costed and measured.

trace_checkpoint(...) → Traced ─ lower() → Lowered ─ compile() → Plan
compile_plan(...) does all of it
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from makeready.graphs.checkpoint.base import BLOCKS, PLAIN, Checkpoint, counted, open_checkpoint
from makeready.graphs.checkpoint.config import DTYPES
from makeready.graphs.checkpoint.unread import check_unread
from makeready.graphs.layers.parameter import sources
from makeready.graphs.models import family
from makeready.graphs.passes import rewrite
from makeready.graphs.passes.expand import expand
from makeready.graphs.plan import memory
from makeready.graphs.plan.buckets import Traffic, choose_buckets, prove_coverage
from makeready.graphs.plan.check import check_plan
from makeready.graphs.plan.codec import to_json
from makeready.graphs.plan.plan import SCHEMA, Memory, Options, Plan, PlanError
from makeready.graphs.plan.program import Loading, LoweredProgram
from makeready.graphs.plan.reads import STORED_AS_THEY_ARE, declare_needs, needs
from makeready.graphs.plan.recipe import Param
from makeready.graphs.plan.spec import Bucket, CacheSpec, Field, Limits, StepSpec
from makeready.graphs.plan.targets import Target, find_target
from makeready.graphs.plan.tokenizer_reference import tokenizer_reference
from makeready.graphs.planner.compared import compared
from makeready.graphs.planner.cost import Cost, StepTime, program_cost
from makeready.graphs.planner.ir import Program
from makeready.graphs.planner.lower import lower, place_weights
from makeready.graphs.planner.plan_cache import cache_folder
from makeready.graphs.planner.request import (
    Request,
    activation_dtype,
    cache_of,
    kv_dtype,
    limits_of,
    quantization,
    weight_dtype,
)
from makeready.graphs.planner.trace import trace
from makeready.graphs.planner.verify import drafting, verify, verify_alike
from makeready.graphs.quant.loading import loading_of
from makeready.graphs.quant.scheme import FP8
from makeready.graphs.speculative.base import Setting, guessing
from makeready.graphs.steps.base import Sizing, declare, step_kinds
from makeready.kernels import registry

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Traced:
    """A program for every kind of step: quantized as asked, before any rewrite that keeps numbers."""

    programs: Mapping[str, Program]
    checkpoint: Checkpoint
    target: Target
    limits: Limits
    options: Options
    kv: CacheSpec
    steps: Mapping[str, StepSpec]
    slots: tuple[Field, ...]
    traffic: Traffic

    def as_text(self) -> str:
        """All programs, one line a call."""
        return "\n\n".join(program.as_text() for program in self.programs.values())

    def lower(self) -> Lowered:
        """Rewrite each program."""
        programs, options = {}, self.options
        for kind, program in self.programs.items():
            expanded = verify(expand(program, deterministic=options.deterministic), after="expand")
            programs[kind] = rewrite(expanded, disabled=options.disabled_passes)
        if options.deterministic:
            verify_alike(programs)
        return Lowered(self, programs)


@dataclass(frozen=True)
class Lowered:
    """A rewritten program for every kind of step."""

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
        buckets = self._buckets(context)
        prove_coverage(buckets, t.steps)
        stored: dict[bytes, Param] = {}
        programs: dict[str, LoweredProgram] = {}
        arena = 0
        for phase, program in self.programs.items():
            largest = max((b for b in buckets if b.phase == phase), key=lambda b: (b.tokens, b.rows))
            programs[phase], nbytes = lower(
                program,
                t.target,
                largest,
                stored,
                deterministic=t.options.deterministic,
                # Chains hold more of the arena at once, much more of long prompts, and their kernels take few rows.
                chained=t.target.is_cuda and not t.options.deterministic and t.steps[phase].each == 1,
                lanes=t.target.is_cuda and t.options.lanes,
            )
            memory.prove_places(programs[phase].buffers, (b for b in buckets if b.phase == phase), largest)
            arena = max(arena, nbytes)
        weights, weight_bytes = place_weights(list(stored.values()))
        loading = loading_of(weights, t.target) if t.target.is_cuda else None
        if loading is not None:
            arena = max(arena, loading.places * loading.place_bytes)
        checkpoint = t.checkpoint
        plan = Plan(
            schema=SCHEMA,
            target=t.target.name,
            architecture=checkpoint.config["architectures"][0],
            checkpoint=checkpoint.fingerprint(needs(weight.param for weight in weights).keys()),
            tokenizer=tokenizer_reference(checkpoint),
            config=counted(checkpoint.config),
            limits=t.limits,
            options=t.options,
            kv=t.kv,
            steps=t.steps,
            slots=t.slots,
            buckets=buckets,
            memory=_memory(t.steps, t.slots, weight_bytes, arena),
            weights=weights,
            programs=programs,
            device=t.target.device.name,
            loading=loading,
        )
        if t.target.is_cuda:
            second = {phase: drafting(program) for phase, program in self.programs.items()}
            plan = _with_kernels(plan, t.target, context, second, progress)
        return compared(plan)

    def _buckets(self, context: int) -> tuple[Bucket, ...]:
        t, kinds = self.traced, step_kinds()
        counts = t.options.max_decode_buckets, t.options.max_extend_buckets, t.target.row_counts
        chosen = (
            choose_buckets(
                kind,
                step,
                kinds[kind].shapes(Sizing(t.limits, *counts, t.traffic, step)),
                StepTime(self.programs[kind], t.target, context),
            )
            for kind, step in t.steps.items()
        )
        return tuple(sorted(itertools.chain(*chosen)))


def _with_kernels(
    plan: Plan, target: Target, context: int, guessing: Mapping[str, Collection[str]], progress: Progress
) -> Plan:
    """``plan`` with what its launches run on a GPU; ``guessing`` are values of a second model, by phase."""
    from makeready.graphs.planner.cuda.emit import emit  # imports triton

    loads = plan.loading.programs if plan.loading is not None else ()
    emitted = emit(
        {**plan.programs, **{load.program.phase: load.program for load in loads}},
        {phase: plan.specs(phase) for phase in plan.programs}
        | {load.program.phase: {made.name: made.spec for made in load.results.values()} for load in loads},
        (*plan.buckets, *(load.bucket for load in loads)),
        target,
        context=context,
        keep=plan.options.candidates,
        cache=cache_folder() / "kernels",
        deterministic=plan.options.deterministic,
        reports=_special_results(plan.steps),
        guessing=guessing,
        loads={load.program.phase for load in loads},
        progress=lambda done, total: progress(f"compile kernels {done}/{total}"),
    )
    lanes = 2 if any(program.lanes for program in plan.programs.values()) else 1
    made = replace(
        plan,
        programs={phase: emitted.programs[phase] for phase in plan.programs},
        loading=plan.loading and _emitted(plan.loading, emitted.programs),
        binaries=emitted.binaries,
        cubins=emitted.cubins,
        dropped=emitted.dropped,
        memory=replace(
            plan.memory,
            scratch=lanes * emitted.scratch,
            side_scratch=(lanes - 1) * emitted.scratch,
            arena=max(plan.memory.arena, emitted.arena),
        ),
    )
    return check_plan(made) if lanes > 1 else made


def _special_results(steps: Mapping[str, StepSpec]) -> set[str]:
    """Results that only some kinds of step have."""
    results = [{field.name for field in step.results} for step in steps.values()]
    return set.union(*results) - set.intersection(*results)


def _emitted(loading: Loading, programs: Mapping[str, LoweredProgram]) -> Loading:
    """``loading`` with its programs' kernels."""
    made = (replace(o, program=_without_scratch(programs[o.program.phase])) for o in loading.programs)
    return replace(loading, programs=tuple(made))


def _without_scratch(program: LoweredProgram) -> LoweredProgram:
    """``program`` if its kernels may run at once in different places.

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
    target = find_target(request.target, request.device)
    _discover(target)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    described = family.family_of(checkpoint.config)
    limits = limits_of(request, target, described.longest(checkpoint.config), checkpoint.config["vocab_size"])
    activation = activation_dtype(request, target)
    cache = kv_dtype(request, target)
    scheme = quantization(request, target, checkpoint)
    model = described.build(checkpoint.config, context_len=limits.context_len, activation=activation)
    model = guessing(model, Setting(checkpoint, request, limits, activation))
    weights = weight_dtype(request, target, checkpoint, sources(model))
    kv = cache_of(request, model, limits.page_size, cache)
    steps, slots = declare(limits, request, kv)
    kinds = step_kinds()
    programs: dict[str, Program] = {}
    for name, step in steps.items():
        program = trace(
            model,
            kinds[name],
            step,
            limits,
            request,
            slots=slots,
            kv=kv,
            weight_dtype=weights,
            vector_dtype=activation,
        )
        program = verify(program, after="trace")
        if scheme is not None:
            program = verify(scheme.rewrite(program), after="quantization")
        programs[name] = program
    _check_sources(
        {n: p for program in programs.values() for n, p in program.params.items()}.values(), checkpoint
    )
    asked = {f.name: getattr(request, f.name) for f in fields(Options)}
    decided = {
        "weight_dtype": weights,
        "activation_dtype": activation,
        "kv_dtype": cache,
        "disabled_passes": tuple(sorted(set(request.disabled_passes))),
        "traffic": to_json(request.traffic),
    }
    options = Options(**(asked | decided))
    return Traced(programs, checkpoint, target, limits, options, kv, steps, slots, request.traffic)


def compile_plan(
    checkpoint: Checkpoint | str | Path,
    request: Request | None = None,
    *,
    progress: Progress = lambda stage: None,
    **changes: Any,
) -> Plan:
    """Trace, lower and compile: ``compile_plan(path, target="cpu", max_rows=8)``.

    Args:
        checkpoint: a checkpoint, or the path of one.
        request: what to ask for; fields of :class:`Request` may be given as ``changes``, instead or on top.
        progress: called with the name of each stage as it begins, for kernels with how many are compiled.
    """
    request = replace(request or Request(), **changes)
    progress("trace")
    traced = trace_checkpoint(checkpoint, request)
    progress("lower")
    lowered = traced.lower()
    progress("compile")
    return lowered.compile(progress)


def _check_sources(params: Collection[Param], checkpoint: Checkpoint) -> None:
    """Every parameter's source exists in the checkpoint, in the shape that the config implies."""
    wanted = needs(params)
    declare_needs(checkpoint, wanted)
    for source, need in wanted.items():
        info = checkpoint.find(source)
        if info is None:
            raise PlanError(f"the checkpoint {checkpoint.path} lacks the tensor {source}; is it complete?")
        if not need.fits(info.shape, exactly=True):
            raise PlanError(
                f"tensor {source} of {checkpoint.path} is {list(info.shape)}, the config implies "
                f"{list(need.shape)}; config.json belongs to another checkpoint"
            )
        if info.kind in need.kinds:
            continue
        if info.kind not in (PLAIN, BLOCKS, *STORED_AS_THEY_ARE):
            raise PlanError(
                f"tensor {source} of {checkpoint.path} is {info.dtype}, which is no quantization of weights that is "
                f"known here; use a checkpoint in {', '.join(DTYPES)}, {FP8} or int8 with scales, AWQ, GPTQ or GGUF"
            )
        exact = need.kinds[0] if need.kinds[0] in STORED_AS_THEY_ARE else f"no {info.dtype}"
        raise PlanError(
            f"tensor {source} of {checkpoint.path} is {info.dtype}, its quantization_config implies {exact}; "
            "config.json belongs to another checkpoint"
        )
    check_unread(checkpoint, wanted)


def _memory(steps: Mapping[str, StepSpec], slots: tuple[Field, ...], weights: int, arena: int) -> Memory:
    def most(fields: Callable[[StepSpec], tuple[Field, ...]]) -> int:
        """Bytes that the largest step of any kind takes."""
        return max(memory.layout(fields(step), step.largest)[1] for step in steps.values())

    return Memory(
        weights=weights,
        arena=arena,
        step=most(lambda step: step.staged),
        slot=memory.layout(slots, {})[1],
        result=most(lambda step: step.results),
    )
