"""Whether a plan's parts fit together: what is checked of a plan that comes from elsewhere, before anything uses it.

A digest says that a plan is whole, not that it is sane: whoever makes a plan signs it as well. So every place,
size and name that the runtime goes by is held against the others here. What kernels do with the memory they are
given cannot be checked: a plan for a GPU holds machine code (docs/plans.md).

Imports neither torch nor triton. The CPU executable, which has the op contracts, checks launches by them, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.plan import memory
from makeready.graphs.plan.buckets import prove_coverage
from makeready.graphs.plan.check_cuda import check_chains, check_kernels, check_nodes
from makeready.graphs.plan.check_generated import check_generated
from makeready.graphs.plan.check_lanes import check_lanes
from makeready.graphs.plan.plan import Plan, PlanError, Weight
from makeready.graphs.plan.program import Buffer, LoweredProgram
from makeready.graphs.plan.reads import complaint
from makeready.graphs.plan.recipe import Derived, Param
from makeready.graphs.plan.rules import MOST, ContradictionError, inside, need
from makeready.graphs.plan.spec import DEVICE, HOST, LATE, Field
from makeready.graphs.plan.targets import TARGETS
from makeready.kernels.spec import DTYPE_BYTES, PAGES, ROWS, TOKENS

MOST_BUCKETS = 10_000  # a plan has some dozens
MOST_READS = 2**16  # boxes that make up an operand: some hundreds of experts


# Integers say where memory is read and written, so an operand takes the field of its own name, what the
# launches before call so, or this one; of the cache group whose tensors the launch names.
_OF_GROUPS = ("state_in", "state_out", "grow_page", "pages")
INDICES = {
    "row_slot": ("sample_slot", "target_slot", "draft_slot", "chain_slot", "draw_slot"),
    "tokens": ("target_ids",),
    "token_ids": ("draft_ids",),
    "query_start": ("draft_start",),
    "query_len": ("draft_len",),
    "context_len": ("draft_context", "draw_context"),
    "positions": ("prior", "places", "after"),
    "token_slot": ("chain_slot",),
    "d2t": ("draft.d2t",),
    "tree": ("grown",),
    "drawn": ("tokens",),
    "tree_start": ("start",),
}
_OF_TREES = (
    "parent",
    "depth",
    "ancestors",
    "children",
    "level",
    "below",
)  # numbers of nodes, and sets of them


def check_plan(plan: Plan) -> Plan:
    """Return ``plan`` if its parts fit together.

    Raises:
        PlanError: naming the first part that does not.
    """
    try:
        for check in (
            _limits,
            _steps,
            _cache,
            _buckets,
            _memory,
            _weights,
            _programs,
            check_kernels,
            _config,
        ):
            check(plan)
    except (ContradictionError, PlanError) as error:
        raise PlanError(
            f"the plan for target {plan.target} contradicts itself: {error}; compile it again"
        ) from None
    return plan


def _limits(plan: Plan) -> None:
    limits = plan.limits
    need(plan.target in TARGETS, f"target {plan.target!r} is none")
    for name in ("max_rows", "max_tokens", "context_len", "page_size"):
        value = getattr(limits, name)
        need(1 <= value <= MOST, f"limits.{name} is {value}")
    for name in ("max_stop_ids", "max_logit_bias", "max_top_logprobs"):
        value = getattr(limits, name)
        need(0 <= value <= MOST, f"limits.{name} is {value}")
    need(1 <= limits.max_gain <= limits.context_len, f"limits.max_gain is {limits.max_gain}")
    need(limits.slots * limits.context_len <= 2**62, f"limits.context_len is {limits.context_len}")


def _steps(plan: Plan) -> None:
    """What steps stage, keep and report has the sizes that the engine goes by."""
    limits = plan.limits
    need(bool(plan.steps), "there are no steps")
    for kind, step in plan.steps.items():
        need(1 <= step.rows <= limits.max_rows, f"{kind} steps have {step.rows} rows")
        need(
            step.rows <= step.tokens <= max(limits.max_tokens, limits.max_rows),
            f"{kind} steps have {step.tokens} tokens",
        )
        need(
            step.each is None or step.tokens == step.rows * step.each,
            f"rows of {kind} steps have {step.each} tokens",
        )
        need(
            all(0 < ratio < math.inf for ratio in step.ratios.values())
            and max(step.ratios, default=step.rows) == step.rows,
            f"{kind} steps take {dict(step.ratios)} of others",
        )
        names = {field.name for field in step.results}
        need(names.issuperset(step.early), f"{kind} steps have no results {step.early}")
        for field in (*step.staged, *step.results):
            shape = field.spec.shape
            sane = shape[:1] in ((ROWS,), (TOKENS,)) and all(
                type(n) is int and 1 <= n <= MOST for n in shape[1:]
            )
            need(
                sane and _holds(field),
                f"{field.name} of {kind} steps is {field.spec}, by default {field.default}",
            )
    widths = {"history": limits.context_len, "pages": limits.pages_per_row}
    for field in plan.slots:
        shape = field.spec.shape
        sane = shape[:1] == (limits.slots,) and all(type(n) is int and 1 <= n <= MOST for n in shape[1:])
        need(sane and _holds(field), f"slot field {field.name} is {field.spec}, by default {field.default}")
        need(field.keeper in (HOST, DEVICE, LATE), f"slot field {field.name} is kept by {field.keeper!r}")
        wanted = widths.get(field.name)
        need(wanted is None or shape[1:] == (wanted,), f"slot field {field.name} is {field.spec}")


def _holds(field: Field) -> bool:
    """Whether a field has a dtype that the host writes, which its default fits into."""
    if field.spec.dtype == "float32":
        return True
    bounds = {"int32": 2**31, "int64": 2**63}.get(field.spec.dtype, 0)
    return type(field.default) is int and -bounds <= field.default < bounds


def _cache(plan: Plan) -> None:
    kv = plan.kv
    need(
        kv.page_size == plan.limits.page_size,
        f"kv.page_size is {kv.page_size}, limits.page_size {plan.limits.page_size}",
    )
    need(bool(kv.parts), "kv.parts has none")
    for group, part in ((g, part) for g in kv.groups for part in g.parts):
        need(part.dtype in DTYPE_BYTES, f"KV part {part.name} has the dtype {part.dtype!r}")
        shape = list(part.page_shape)
        need(
            len(shape) > 1 and all(1 <= n <= MOST for n in shape),
            f"a page of KV part {part.name} has the shape {shape}",
        )
        need(
            group.unit is None or shape[0] == kv.page_size,
            f"a page of KV part {part.name} holds {shape[0]} tokens, kv.page_size is {kv.page_size}",
        )
    fields = [f.name for fields in _all_fields(plan).values() for f in fields]
    names = [*dict.fromkeys(fields), *(part.name for part in kv.parts), *(w.param.name for w in plan.weights)]
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    need(twice is None, f"{twice} names two values")


def _buckets(plan: Plan) -> None:
    need(len(plan.buckets) <= MOST_BUCKETS, f"there are {len(plan.buckets)} buckets")
    for bucket in plan.buckets:
        need(bucket.phase in plan.steps, f"bucket {bucket} is of no phase of the plan")
        need(bucket.rows >= 1 and bucket.tokens >= 1, f"bucket {bucket} is empty")
    prove_coverage(plan.buckets, plan.steps)


def _memory(plan: Plan) -> None:
    """The host's regions have the bytes that their fields take; the others are held against what lies in them."""
    sizes = {phase: _largest(plan, phase) for phase in plan.steps}
    said = {
        name: getattr(plan.memory, name) for name in ("weights", "arena", "step", "slot", "result", "scratch")
    }
    for name, nbytes in said.items():
        need(0 <= nbytes < 2**62, f"memory.{name} is {nbytes}")
    half = plan.memory.side_scratch
    need(
        half in (0, plan.memory.scratch / 2),
        f"memory.side_scratch is {half}, memory.scratch {plan.memory.scratch}",
    )
    needed = {
        name: max(
            memory.layout(fields, sizes[phase])[1]
            for (of, phase), fields in _all_fields(plan).items()
            if of == name
        )
        for name in ("step", "slot", "result")
    }
    for name, nbytes in needed.items():
        need(said[name] == nbytes, f"memory.{name} is {said[name]}, its fields take {nbytes}")


def _all_fields(plan: Plan) -> dict[tuple[str, str], tuple[Field, ...]]:
    made: dict[tuple[str, str], tuple[Field, ...]] = {}
    for phase, step in plan.steps.items():
        made["step", phase], made["result", phase], made["slot", phase] = (
            step.staged,
            step.results,
            plan.slots,
        )
    return made


def _largest(plan: Plan, phase: str) -> dict[str, int]:
    return plan.steps[phase].largest


def _weights(plan: Plan) -> None:
    for weight in plan.weights:
        name, spec = weight.param.name, weight.param.spec
        need(all(type(n) is int for n in spec.shape), f"weight {name} has the shape {spec}")
        need(
            weight.nbytes == spec.nbytes({}) and inside(weight.offset, weight.nbytes, plan.memory.weights),
            f"weight {name}, {spec}, takes bytes {weight.offset} to {weight.offset + weight.nbytes} "
            f"of {plan.memory.weights}",
        )
        need(weight.offset % memory.ALIGNMENT == 0, f"weight {name} begins at byte {weight.offset}")
        _recipe(weight)


def _recipe(weight: Weight) -> None:
    param = weight.param
    ways = [bool(param.pieces), param.generated is not None, param.derived is not None]
    need(sum(ways) == 1, f"weight {param.name} has no recipe, or two")
    if param.generated is not None:
        check_generated(param)
    if param.derived is not None:
        _derived(param, param.derived)
    for operand in param.operands:
        shape = operand.spec.shape
        need(
            bool(shape) and all(type(n) is int and n >= 1 for n in shape),
            f"weight {param.name} is assembled as {operand.spec}",
        )
        need(operand.unit >= 0, f"weight {param.name} has units of {operand.unit} rows")
        count = sum(math.prod(max(each.count, 0) for each in piece.each) for piece in operand.pieces)
        need(count <= MOST_READS, f"weight {param.name} is made of {count} boxes")
        reason = complaint(operand)
        need(not reason, f"the pieces of weight {param.name} {reason}")


def _derived(param: Param, derived: Derived) -> None:
    """A derivation's calls read what is there by then, and one of them gives the parameter."""
    known = set(derived.by.operands)
    for call in derived.by.calls:
        need(
            set(call.operands.values()) <= known and not known & set(call.results.values()),
            f"weight {param.name}: {call.op} reads what nothing gives, or gives what is there",
        )
        known |= set(call.results.values())
    need(
        derived.result in known,
        f"weight {param.name} is {derived.result!r} of its derivation, which is nothing",
    )


def _programs(plan: Plan) -> None:
    need(
        set(plan.programs) == set(plan.steps),
        f"programs are for {', '.join(plan.programs)}, steps are {', '.join(plan.steps)}",
    )
    for phase, program in plan.programs.items():
        need(program.phase == phase, f"program {phase} says that it is for {program.phase!r}")
        sizes = _largest(plan, phase)
        names = _values(plan, phase)
        for name, buffer in program.buffers.items():
            where = f"{phase}: buffer {name}"
            need(name not in names, f"{where} has the name of another value")
            _buffer(where, buffer, sizes, plan.memory.arena)
        _order(plan, program, names)
        if TARGETS[plan.target].is_cuda:
            check_chains(plan, program, phase)
            check_nodes(plan, program, [str(b) for b in plan.buckets if b.phase == phase], phase)
            check_lanes(plan, program)
        else:
            need(not program.lanes, f"{phase}: there are two lanes, which the CPU does not have")


def _values(plan: Plan, phase: str) -> set[str]:
    fields = _all_fields(plan)
    made = {f.name for of in ("step", "result", "slot") for f in fields[of, phase]}
    return made | {part.name for part in plan.kv.parts} | {weight.param.name for weight in plan.weights}


def _order(plan: Plan, program: LoweredProgram, names: set[str]) -> None:
    """What a launch reads is there by then, indices are the engine's own, and all results are given in the end."""
    phase, made = program.phase, dict[str, str]()
    results = {f.name for f in _all_fields(plan)["result", phase]}
    views = {name for name, buffer in program.buffers.items() if buffer.row_stride is not None}
    constants = {w.param.name: w.param.generated for w in plan.weights}
    nothing = {name for name, made_by in constants.items() if made_by and made_by.function == "zeros"}
    tables = {name for name, made_by in constants.items() if made_by and made_by.function == "numbers"}
    for launch in program.launches:
        named = set(launch.operands.values())
        of_groups = [g.name for g in plan.kv.groups if any(part.name in named for part in g.parts)]
        groups = of_groups or [g.name for g in plan.kv.groups]
        for operand, value in launch.operands.items():
            where = f"{phase}: {launch.op} reads {value!r}"
            need(value in names or value in program.buffers, f"{where}, which is nothing")
            need(
                value in made or value in views or value in names - results,
                f"{where} before any launch gives it",
            )
            if plan.spec(phase, value).dtype in ("int32", "int64"):
                index = {operand, *INDICES.get(operand, ())}
                fields = {plan.kv.field(group, name) for group in groups for name in index}
                own = fields if operand in _OF_GROUPS else fields | index
                unmasked = operand in ("masked", "allowed") and value in nothing
                of_tree = operand in _OF_TREES and value in tables
                need(value in own or made.get(value) in index or unmasked or of_tree, f"{where} as {operand}")
        for result, value in launch.results.items():
            need(
                (value in results or value in program.buffers) and value not in made,
                f"{phase}: {launch.op} gives {value!r}, which no launch may write, or another gives",
            )
            made[value] = result
    missing = sorted(results - made.keys())
    need(not missing, f"{phase}: no launch gives {', '.join(missing)}")


def _buffer(where: str, buffer: Buffer, sizes: Mapping[str, int], arena: int) -> None:
    spec = buffer.spec
    need(PAGES not in spec.shape, f"{where} has a size that only the cache has")
    shape, width = spec.at(sizes), DTYPE_BYTES[spec.dtype]
    if buffer.row_stride is None:
        nbytes = spec.nbytes(sizes)
    else:
        need(
            len(shape) == 2 and 0 < int(shape[1]) <= buffer.row_stride,
            f"{where}, {spec}, has rows {buffer.row_stride} elements apart",
        )
        nbytes = ((shape[0] - 1) * buffer.row_stride + shape[1]) * width
    need(
        inside(buffer.offset, nbytes, arena) and buffer.offset % width == 0,
        f"{where}, {spec}, takes bytes {buffer.offset} to {buffer.offset + nbytes} of {arena}",
    )


def _config(plan: Plan) -> None:
    """The engine reads the vocabulary and end tokens of the config that the plan carries."""
    try:
        normalise_config(dict(plan.config), source="the plan's config.json")
    except CheckpointError as error:
        raise ContradictionError(str(error)) from None
