"""From programs to launches: kernels chosen, views resolved, temps placed in one arena."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from makeready.graphs.plan.codec import canonical, to_json
from makeready.graphs.plan.lanes import in_one_lane
from makeready.graphs.plan.memory import Interval, align, assign
from makeready.graphs.plan.plan import PlanError, Weight
from makeready.graphs.plan.program import Buffer, Chain, Lane, Launch, LoweredProgram
from makeready.graphs.plan.recipe import Param
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import Target
from makeready.graphs.planner.chains import find_chains, together
from makeready.graphs.planner.ir import KV, LOADED, PARAM, SLOT, TEMP, Columns, Program
from makeready.graphs.planner.lanes import affordable, find_lanes, meanwhile
from makeready.kernels import registry
from makeready.kernels.spec import DTYPE_BYTES


def lower(
    program: Program,
    target: Target,
    largest: Bucket,
    stored: dict[bytes, Param],
    *,
    deterministic: bool = False,
    chained: bool = False,
    lanes: bool = False,
) -> tuple[LoweredProgram, int]:
    """Launches of ``program`` and the arena bytes they need at its ``largest`` bucket.

    Where it may be ``chained``, some buckets may run neighbouring launches as one call: what those name is in the
    arena from the first to the last. With ``lanes``, independent branches run beside each other: launches come in an
    order in which each is neighbours, and what one of them names is in the arena while the other runs. Where that
    takes much more of it, as of long prompts, they run one after the other.

    ``stored`` collects the parameters in the layouts that the chosen kernels want, by content: programs that
    share it share parameters, and so do an embedding and a head that are one tensor of the checkpoint.

    Raises:
        PlanError: it is to be ``deterministic``, and an op has no kernel for the CPU that is.
    """
    # A GPU's kernels are chosen when they are compiled; what its launches name is the reference.
    invariant = deterministic and not target.is_cuda
    views = _views(program)
    launches = []
    for call in program.calls:
        if call.contract.view is not None:
            continue
        if call.contract.expands:
            raise PlanError(
                f"{call.op} is to be expanded for steps of kind {program.phase} before it is lowered"
            )
        specs = program.operand_specs(call)
        try:
            chosen = registry.choose(call.op, target.name, specs, call.attrs, invariant=invariant)
        except LookupError as error:
            raise PlanError(f"{error.args[0]}; compile without plan.deterministic") from None
        operands = dict(call.operands)
        for operand, value in call.operands.items():
            if program.values[value].kind == PARAM:
                operands[operand] = _stored(
                    program.params[value], chosen.layouts.get(operand, "rows"), stored
                )
        # A program's results are written where the host reads them, not into the arena.
        names = {value: result for result, value in program.results.items()}
        results = {k: names.get(v, v) for k, v in call.results.items()}
        operands = {k: names.get(v, v) for k, v in operands.items()}
        launches.append(Launch(call.op, chosen.name, operands, results, dict(call.attrs)))
    bases = {name: view.base for name, view in views.items()}
    beside: tuple[Lane, ...] = ()
    if lanes:
        lasting = {name for name, value in program.values.items() if value.kind in (SLOT, KV)}
        launches, beside = find_lanes(launches, bases, lasting)
        alone, most = _place(program, launches, (), (), views, largest)
        held = {
            n: Interval(n, b.spec.nbytes(largest.sizes), b.first, b.last)
            for n, b in alone.items()
            if n not in views
        }
        beside = affordable(beside, launches, bases, held, most)
    chains = find_chains(launches, bases, program.results) if chained else ()
    chains = tuple(c for c in chains if in_one_lane(c.first, c.stop, beside))
    buffers, nbytes = _place(program, launches, chains, beside, views, largest)
    return LoweredProgram(program.phase, tuple(launches), buffers, chains=chains, lanes=beside), nbytes


def place_weights(params: Sequence[Param]) -> tuple[tuple[Weight, ...], int]:
    """Parameters one after the other in the weights region, and its bytes."""
    weights, end = [], 0
    for param in params:
        nbytes = param.spec.nbytes({})
        weights.append(Weight(param, end, nbytes))
        end += align(nbytes)
    return tuple(weights), end


def _stored(param: Param, layout: str, stored: dict[bytes, Param]) -> str:
    """Name of ``param`` in ``layout``: its own, with the layout behind it where that is not ``rows``.

    That of another parameter where it has the same bytes.
    """
    name = param.name if layout == "rows" else f"{param.name}@{layout}"
    content = canonical(to_json(replace(param, name="", quantizable=False, layout=layout)))
    return stored.setdefault(content, replace(param, name=name, layout=layout)).name


def _views(program: Program) -> dict[str, Columns]:
    """By name of each view the columns of what is no view itself."""
    views: dict[str, Columns] = {}
    for call in program.calls:
        seen = program.columns(call)
        if seen is None and call.contract.view is not None:
            width = program.spec(call.result).shape[-1]
            raise PlanError(
                f"{call.op} gives {call.result}, whose rows are as long as {width}; views have one width"
            )
        if seen is not None:
            outer = views.get(seen.base)
            shift = 0 if outer is None else outer.start
            base = seen.base if outer is None else outer.base
            views[call.result] = Columns(base, shift + seen.start, shift + seen.stop)
    return views


def _place(
    program: Program,
    launches: Sequence[Launch],
    chains: Sequence[Chain],
    lanes: Sequence[Lane],
    views: Mapping[str, Columns],
    largest: Bucket,
) -> tuple[dict[str, Buffer], int]:
    """Arena buffers of all temps and views that the launches name."""
    loaded = {n for n, v in program.values.items() if v.kind == LOADED}
    first, last = dict.fromkeys(loaded, 0), dict.fromkeys(loaded, 0)
    for at, launch in enumerate(launches):
        for name in (*launch.operands.values(), *launch.results.values()):
            base = views[name].base if name in views else name
            first.setdefault(base, at)
            last[base] = at
    for start, end, name in (*together(chains, launches), *meanwhile(lanes, launches)):
        base = views[name].base if name in views else name
        first[base], last[base] = min(first[base], start), max(last[base], end)
    temps = {n for n, v in program.values.items() if v.kind == TEMP} - set(program.results.values()) | loaded
    bases = sorted(n for n in first if n in temps)
    outside = {v.base for v in views.values()} - temps
    if outside:
        raise PlanError(f"columns of {min(outside)} are taken, which is not a temporary value")
    returned = views.keys() & set(program.results.values())
    if returned:
        raise PlanError(
            f"{min(returned)} is a view and a result of the step, which the host reads as a whole"
        )
    offsets, nbytes = assign(
        [Interval(n, program.spec(n).nbytes(largest.sizes), first[n], last[n]) for n in bases]
    )
    buffers = {n: Buffer(program.spec(n), offsets[n], None, first[n], last[n]) for n in bases}
    for name, view in views.items():
        if view.base in buffers:
            base = buffers[view.base]
            width = int(base.spec.shape[-1])
            offset = base.offset + view.start * DTYPE_BYTES[base.spec.dtype]
            buffers[name] = replace(base, spec=program.spec(name), offset=offset, row_stride=width)
    return buffers, nbytes
