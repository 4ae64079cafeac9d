"""What a plan costs and what it holds, as figures.

Costs are those of graphs/planner/cost.py, which chose the buckets; memory is arithmetic over the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from makeready.graphs.inspect.segments import one_token, segments, value_spec
from makeready.graphs.plan.plan import Plan, PlanError, Weight
from makeready.graphs.plan.program import Launch
from makeready.graphs.plan.reads import reads
from makeready.graphs.plan.recipe import Box
from makeready.graphs.plan.spec import Bucket, Split
from makeready.graphs.plan.targets import Target, target_of
from makeready.kernels.spec import TensorSpec

if TYPE_CHECKING:
    from makeready.kernels.contract import Contract

CAPACITY_GIB = (1, 2, 4, 8, 16, 32, 64, 80)


@dataclass(frozen=True)
class LaunchCost:
    """What one launch, or several of a kind together, take in one step.

    Attributes:
        op, kernel: contract and implementation; on a GPU the first candidate of the bucket.
        layer: the layer's number in decimal, empty before and after the layers.
        weight: spec of the operand ``weight``, which tells projections apart; None without one.
        nbytes: moved between memory and the cores, each operand once.
        flops: floating-point operations.
        memory_seconds, compute_seconds: the two over the target's rates.
        launch_seconds: the target's fixed cost of a launch.
    """

    op: str
    kernel: str
    layer: str
    weight: TensorSpec | None
    nbytes: float
    flops: float
    memory_seconds: float
    compute_seconds: float
    launch_seconds: float
    launches: int = 1

    @property
    def seconds(self) -> float:
        """Roofline time: the larger of memory and compute, and the launch on top."""
        return max(self.memory_seconds, self.compute_seconds) + self.launch_seconds

    @property
    def bound(self) -> str:
        """Which of ``memory``, ``compute`` and ``launch`` takes longest."""
        parts = {
            "memory": self.memory_seconds,
            "compute": self.compute_seconds,
            "launch": self.launch_seconds,
        }
        return max(parts, key=lambda name: parts[name])


def largest_bucket(plan: Plan, phase: str) -> Bucket:
    """The bucket that the phase's arena offsets are made for."""
    return max((b for b in plan.buckets if b.phase == phase), key=lambda b: (b.tokens, b.rows))


def launch_costs(plan: Plan, bucket: Bucket, context: int, target: Target | None = None) -> list[LaunchCost]:
    """Cost of every launch of a step in ``bucket``, in order.

    Args:
        plan: whose launches.
        bucket: shapes of the step.
        context: tokens of context a row; more than the plan's context length counts as that.
        target: whose figures count; None takes those that the plan was chosen by.
    """
    program = plan.programs[bucket.phase]
    context = min(context, plan.limits.context_len)
    target = target or target_of(plan)
    known: dict[tuple[Any, ...], LaunchCost] = {}  # layers repeat the same few launches
    costs = []
    for segment in segments(program):
        for launch in program.launches[segment.start : segment.stop]:
            key = launch_key(plan, bucket.phase, launch)
            if key not in known:
                known[key] = _launch_cost(plan, launch, bucket, context, target)
            costs.append(replace(known[key], layer=segment.layer))
    return costs


def kernel_of(plan: Plan, launch: Launch, bucket: Bucket) -> str:
    """Which implementation a launch runs in ``bucket``, before any tuning for one device."""
    if launch.op_class < 0:
        return launch.kernel
    candidates = plan.programs[bucket.phase].classes[launch.op_class].candidates.get(str(bucket))
    return candidates[0].name if candidates else launch.kernel


def launch_key(plan: Plan, phase: str, launch: Launch) -> tuple[Any, ...]:
    """What the cost of a launch depends on, apart from bucket, context and target."""
    named = sorted((*launch.operands.items(), *launch.results.items()))
    specs = tuple((role, value_spec(plan, phase, value)) for role, value in named)
    return (
        launch.op,
        launch.kernel,
        launch.op_class,
        specs,
        tuple(sorted((k, str(v)) for k, v in launch.attrs.items())),
    )


@cache
def contracts() -> Mapping[str, Contract]:
    """All op contracts. Imports torch, which the rest of this module does without."""
    from makeready.kernels import registry
    from makeready.kernels.contract import CONTRACTS

    registry.discover()
    return CONTRACTS


def work(
    plan: Plan, phase: str, launch: Launch, sizes: Mapping[str, Any], context: int, target: Target
) -> tuple[Any, Any, float]:
    """Bytes and operations of a launch, at one length of every axis or at arrays of them, and the target's rate
    of such operations.
    """
    from makeready.graphs.planner.cost import op_rate, op_work

    operands = {role: value_spec(plan, phase, value) for role, value in launch.operands.items()}
    results = [value_spec(plan, phase, value) for value in launch.results.values()]
    contract = contracts()[launch.op]
    nbytes, flops = op_work(contract, operands, results, launch.attrs, sizes, context)
    return nbytes, flops, op_rate(contract, operands, target)


def _launch_cost(plan: Plan, launch: Launch, bucket: Bucket, context: int, target: Target) -> LaunchCost:
    nbytes, flops, rate = work(plan, bucket.phase, launch, bucket.sizes, context, target)
    weight = launch.operands.get("weight")
    return LaunchCost(
        op=launch.op,
        kernel=kernel_of(plan, launch, bucket),
        layer="",
        weight=None if weight is None else value_spec(plan, bucket.phase, weight),
        nbytes=float(nbytes),
        flops=float(flops),
        memory_seconds=nbytes / target.bandwidth,
        compute_seconds=flops / rate,
        launch_seconds=target.launch_seconds,
    )


def by_kernel(costs: Iterable[LaunchCost], *, weights: bool = False) -> list[LaunchCost]:
    """Launches of the same op and kernel added up, the longest first.

    ``weights`` keeps those with weights of different shapes apart. Where launches of a kind differ in
    what bounds them, their sums decide.
    """
    kinds: dict[tuple[Any, ...], list[LaunchCost]] = {}
    for cost in costs:
        kinds.setdefault((cost.op, cost.kernel, cost.weight if weights else None), []).append(cost)
    merged = []
    for (op, kernel, weight), same in kinds.items():
        sums = {
            name: math.fsum(getattr(c, name) for c in same)
            for name in ("nbytes", "flops", "memory_seconds", "compute_seconds", "launch_seconds")
        }
        merged.append(LaunchCost(op, kernel, "", weight, **sums, launches=len(same)))
    return sorted(merged, key=lambda c: -c.seconds)


def cost_analysis(plan: Plan, context: int = 1024) -> dict[Bucket, dict[str, float]]:
    """What a full step of every bucket takes, at the target's rates.

    Returns:
        by bucket: ``nbytes``, ``flops``, ``seconds`` (sum of the launches' roofline times) and
        ``tokens_per_second``, an upper bound: tokens made by a decode step or read by an extend step.
    """
    analysis = {}
    for bucket in plan.buckets:
        costs = launch_costs(plan, bucket, context)
        seconds = math.fsum(c.seconds for c in costs)
        analysis[bucket] = {
            "nbytes": math.fsum(c.nbytes for c in costs),
            "flops": math.fsum(c.flops for c in costs),
            "seconds": seconds,
            "tokens_per_second": (bucket.rows if one_token(plan, bucket.phase) else bucket.tokens) / seconds,
        }
    return analysis


def memory_analysis(plan: Plan) -> dict[str, Any]:
    """Where the plan's bytes are.

    Returns:
        ``regions``: bytes of every region of :class:`~makeready.graphs.plan.plan.Memory`. ``fixed``: their sum.
        ``weights_by_dtype``: bytes of parameters by the dtype they are stored in, padding between them
        left out. ``parameters``: numbers of the checkpoint that the plan reads, each counted once.
        ``stored_twice``: bytes of rows that are stored again, in another layout or for another use.
        ``generated``: bytes of constants that the loader computes.
        ``arena_by_phase``: bytes of the arena that a phase's buffers reach to, at its largest bucket.
        ``kv``: ``dtypes`` (bytes of a page by dtype), ``page_size`` (tokens), ``page_bytes``,
        ``token_bytes``, and what ``max_rows`` rows of full context need: ``full_pages`` (the null page
        included) and ``full_bytes``. ``bounded``: cache groups of windows and states beside ``full_pages``, by
        name: ``blocks``, ``block_bytes`` and ``bytes``, which ``full_bytes`` includes.
        ``capacity``: by GiB of memory, the ``pages`` and ``tokens`` of KV (the null page left out) beside
        the fixed regions, how many ``rows`` of full context they hold, and where there are windows and states for how
        many rows ``in_flight`` and how many ``snapshots``.
    """
    regions = {name: size for name, size in asdict(plan.memory).items() if name != "side_scratch"}
    parameters, again = _distinct(plan.weights)
    full_pages = plan.limits.max_rows * plan.limits.pages_per_row + 1
    blocks = plan.kv.blocks(full_pages, plan.limits)
    bounded = {
        group.name: {
            "blocks": blocks[group.name],
            "block_bytes": group.block_bytes,
            "bytes": blocks[group.name] * group.block_bytes,
        }
        for group in plan.kv.bounded
    }
    paged = [part for group in plan.kv.groups if group.name not in bounded for part in group.parts]
    return {
        "regions": regions,
        "fixed": plan.memory.fixed,
        "weights_by_dtype": _sums((w.param.spec.dtype, w.nbytes) for w in plan.weights),
        "parameters": parameters,
        "stored_twice": again,
        "generated": sum(w.nbytes for w in plan.weights if w.param.generated),
        "arena_by_phase": {phase: _reach(plan, phase) for phase in plan.programs},
        "kv": {
            "dtypes": _sums((part.dtype, part.page_bytes) for part in paged),
            "page_size": plan.kv.page_size,
            "page_bytes": plan.kv.page_bytes,
            "token_bytes": plan.kv.token_bytes,
            "full_pages": full_pages,
            "full_bytes": plan.kv.nbytes(full_pages, plan.limits),
            "bounded": bounded,
        },
        "capacity": {gib: _capacity(plan, gib * 2**30) for gib in CAPACITY_GIB},
    }


def _sums(items: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, nbytes in items:
        sums[name] = sums.get(name, 0) + nbytes
    return dict(sorted(sums.items()))


def _distinct(weights: Iterable[Weight]) -> tuple[int, int]:
    """Elements of the checkpoint read at least once, and bytes of those stored a second time."""
    seen: dict[tuple[str, Box], set[str]] = {}
    elements = again = 0
    for weight in weights:
        param = weight.param
        result = param.derived.result if param.derived is not None else ""  # a weight and its scale are two
        boxes = [read for operand in param.operands for read in reads(operand)]
        total = sum(math.prod(read.shape) for read in boxes)
        for read in boxes:
            results = seen.setdefault((read.source, read.box), set())
            if not results:
                elements += read.elements
            elif result in results:
                again += weight.nbytes * math.prod(read.shape) // total
            results.add(result)
    return elements, again


def _reach(plan: Plan, phase: str) -> int:
    sizes = largest_bucket(plan, phase).sizes
    buffers = plan.programs[phase].buffers.values()
    return max((b.offset + b.spec.nbytes(sizes) for b in buffers if b.row_stride is None), default=0)


def _capacity(plan: Plan, nbytes: int) -> Mapping[str, int]:
    try:
        pages = plan.pages_in(nbytes) - 1
    except PlanError:
        pages = 0
    held = {
        "pages": pages,
        "tokens": pages * plan.kv.page_size,
        "rows": pages // plan.limits.pages_per_row,
    }
    if not plan.kv.bounded:
        return held
    split = plan.kv.split(pages + 1, plan.limits) if pages else Split(0, 0)
    return {**held, "in_flight": split.rows, "snapshots": split.snapshots}
