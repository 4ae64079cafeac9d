"""A plan as text of at most 110 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from makeready.graphs.inspect import units
from makeready.graphs.inspect.analysis import (
    by_kernel,
    cost_analysis,
    kernel_of,
    largest_bucket,
    launch_costs,
    memory_analysis,
)
from makeready.graphs.inspect.experts import Mixture, kernels_of, mixtures, spread
from makeready.graphs.inspect.facts import facts, passes
from makeready.graphs.inspect.padding import padding
from makeready.graphs.inspect.segments import SegmentGroup, groups, local, value_spec
from makeready.graphs.inspect.split import beside_pages
from makeready.graphs.plan.plan import Plan
from makeready.kernels.spec import TensorSpec

WIDTH = 110


def plan_text(plan: Plan, context: int = 1024) -> str:
    """Everything worth knowing about a plan before it runs.

    Args:
        plan: what to explain.
        context: tokens of context a row that step times assume.
    """
    memory = memory_analysis(plan)
    context = min(context, plan.limits.context_len)
    sections = [_head(plan, memory), _memory(memory), _capacity(plan, memory), _buckets(plan, context)]
    sections += [_experts(plan, mixture) for mixture in mixtures(plan)]
    sections += [_kernels(plan, phase, context) for phase in plan.programs]
    sections += [_layer(plan, phase) for phase in plan.programs]
    return "\n\n".join("\n".join(line.rstrip() for line in section) for section in sections) + "\n"


def _head(plan: Plan, memory: Mapping[str, Any]) -> Iterator[str]:
    for label, value in facts(plan, memory):
        yield from _wrapped(f"{label:<13}", value.split(" "))
    on = [name for name, active in passes(plan).items() if active]
    off = [name for name, active in passes(plan).items() if not active]
    yield from _wrapped(f"{'passes on':<13}", on or ["none"])
    yield from _wrapped(f"{'passes off':<13}", off or ["none"])


def _memory(memory: Mapping[str, Any]) -> Iterator[str]:
    yield "Memory"
    rows = [(name, units.nbytes(size), f"{size:,}") for name, size in memory["regions"].items() if size]
    rows.append(("fixed", units.nbytes(memory["fixed"]), f"{memory['fixed']:,}"))
    notes = {
        "weights": ", ".join(f"{units.dtype(d)} {units.nbytes(b)}" for d, b in memory["weights_by_dtype"].items()),
        "arena": ", ".join(f"{p} {units.nbytes(b)}" for p, b in memory["arena_by_phase"].items()),
        "step": "what the host writes for every step",
        "slot": "what the device keeps for every running request",
        "result": "what the host reads after every step",
        "scratch": "what kernels share among their blocks",
    }  # fmt: skip
    if memory["stored_twice"]:
        notes["weights"] += f"; {units.nbytes(memory['stored_twice'])} of it stored a second time"
    yield from table(("region", "size", "bytes", ""), [(*r, notes.get(r[0], "")) for r in rows], "<>><")


def _capacity(plan: Plan, memory: Mapping[str, Any]) -> Iterator[str]:
    kv = memory["kv"]
    made = ", ".join(f"{units.dtype(d)} {units.nbytes(b)}" for d, b in kv["dtypes"].items())
    yield "KV cache"
    yield (
        f"  page of {kv['page_size']} tokens: {units.nbytes(kv['page_bytes'])} ({made}); "
        f"token: {units.nbytes(kv['token_bytes'])}"
    )
    yield (
        f"  {plan.limits.max_rows} rows of {plan.limits.context_len:,} tokens: "
        f"{units.nbytes(kv['full_bytes'])} in {kv['full_pages']:,} pages, the null page included"
    )
    if kv["bounded"]:
        yield f"  beside them {beside_pages(plan, kv['full_pages'])}"
    names = {"pages": "pages", "tokens": "tokens", "rows": "rows of full context"}
    if kv["bounded"]:
        names |= {"in_flight": "rows in flight", "snapshots": "snapshots"}
    rows = [(f"{gib} GiB", *(f"{c[name]:,}" for name in names)) for gib, c in memory["capacity"].items()]
    yield from table(("memory in all", *names.values()), rows, ">" * (1 + len(names)))


def _buckets(plan: Plan, context: int) -> Iterator[str]:
    costs, waste = cost_analysis(plan, context), padding(plan)
    yield f"Buckets: step time and tokens/s are roofline bounds at {context:,} tokens of context a row;"
    yield "padding is the worst and the expected share of tokens and of step time under the plan's traffic"
    rows = []
    for bucket in plan.buckets:
        w, cost = waste.buckets[bucket], costs[bucket]
        rows.append((
            str(bucket), units.span(*w.rows), units.span(*w.tokens), units.percent(w.weight),
            units.seconds(cost["seconds"]), units.digits(cost["tokens_per_second"]),
            *(units.percent(s) for s in (w.token.worst, w.token.expected, w.time.worst, w.time.expected)),
        ))  # fmt: skip
    for phase in plan.programs:
        w = waste.phases[phase]
        shares = (w.token.worst, w.token.expected, w.time.worst, w.time.expected)
        rows.append((f"all {phase}", units.span(*w.rows), units.span(*w.tokens), "", "", "",
                     *(units.percent(s) for s in shares)))  # fmt: skip
    head = ("bucket", "rows", "tokens", "steps", "a step", "tokens/s",
            "tokens≤", "tokens~", "time≤", "time~")  # fmt: skip
    yield from table(head, rows, "<>>>>>>>>>")
    yield "  ≤ worst case, ~ expected"


def _experts(plan: Plan, mixture: Mixture) -> Iterator[str]:
    """One row a bucket; its kernels where they are others than the row's above."""
    every = mixture.nbytes * mixture.experts
    yield (
        f"Experts of {mixture.layers} layers: {mixture.experts} of {units.nbytes(mixture.nbytes)}, "
        f"{units.nbytes(every)} a layer, {units.nbytes(every * mixture.layers)} in all; "
        f"{mixture.top_k} for a token"
    )
    rows, before = [], ""
    for bucket in plan.buckets:
        of = spread(bucket.tokens, mixture.experts, mixture.top_k)
        kernels = ", ".join(kernels_of(plan, mixture, bucket))
        rows.append((
            str(bucket), f"{of.entries:,}", f"{of.hit:,.1f}", units.nbytes(int(of.hit * mixture.nbytes)),
            f"{of.largest:,.1f}", f"{of.imbalance:.2f}", f"{of.worst:,}", kernels if kernels != before else "",
        ))  # fmt: skip
        before = kernels
    head = ("bucket", "entries", "hit~", "read~", "largest~", "/mean~", "worst", "kernels")
    yield from table(head, rows, "<>>>>>><")
    yield "  ~ expected of a router that gives each expert the same chance; worst: all tokens choose alike"


def _kernels(plan: Plan, phase: str, context: int) -> Iterator[str]:
    bucket = largest_bucket(plan, phase)
    merged = by_kernel(launch_costs(plan, bucket, context))
    whole = sum(c.seconds for c in merged)
    yield f"Kernels of {bucket}, {context:,} tokens of context a row: {units.seconds(whole)} a step"
    rows = [
        (f"{c.op}/{c.kernel}", f"{c.launches:,}", units.nbytes(c.nbytes), units.flops(c.flops), c.bound,
         units.seconds(c.seconds), units.percent(c.seconds / whole))
        for c in merged
    ]  # fmt: skip
    head = ("op/kernel", "launches", "moved", "computed", "bound by", "time", "share")
    yield from table(head, rows, "<>>><>>")


def _layer(plan: Plan, phase: str) -> Iterator[str]:
    """The launches of the layers that most layers are like."""
    group = _typical(groups(plan, phase))
    segment, program = group.example, plan.programs[phase]
    stands_for = "" if len(group.members) == 1 else f", launch for launch the same in {group.label}"
    yield f"Launches of {segment.name}, {phase}{stands_for}"
    for at in range(segment.start, segment.stop):
        launch = program.launches[at]
        kernel = kernel_of(plan, launch, largest_bucket(plan, phase))
        results = [f"{local(v)}: {_shape(plan, phase, v)}" for _, v in sorted(launch.results.items())]
        made = [" → ".join((f"{launch.op}/{kernel}", *results[:1])), *results[1:]]
        yield from _wrapped(f"  {at:>4}  ", [f"{word}," for word in made[:-1]] + made[-1:])
        operands = [_operand(plan, phase, role, value) for role, value in sorted(launch.operands.items())]
        yield from _wrapped(" " * 10, [f"{o}," for o in operands[:-1]] + operands[-1:])
    for chain in program.chains:
        if segment.start <= chain.first and chain.stop <= segment.stop:
            found = program.classes[chain.launch.op_class].candidates
            where = ", ".join(bucket for bucket, choices in found.items() if choices)
            yield f"  {chain.first} to {chain.stop - 1} run as {chain.launch.op} in {where}"
    for lane in program.lanes:
        if segment.start <= lane.first and lane.stop <= segment.stop:
            yield f"  {lane.first} to {lane.stop - 1} run beside {lane.fork + 1} to {lane.first - 1}"


def _typical(found: Sequence[SegmentGroup]) -> SegmentGroup:
    layers = [g for g in found if g.example.layer] or list(found)
    return max(layers, key=lambda g: len(g.members))


def _operand(plan: Plan, phase: str, role: str, value: str) -> str:
    name = local(value)
    return f"{name if name == role else f'{role}={name}'}: {_shape(plan, phase, value)}"


def _shape(plan: Plan, phase: str, value: str) -> str:
    return shape_text(value_spec(plan, phase, value))


def shape_text(spec: TensorSpec) -> str:
    """``f32[R, 576]``."""
    return f"{units.dtype(spec.dtype)}[{', '.join(map(str, spec.shape))}]"


def _wrapped(lead: str, words: Sequence[str]) -> Iterator[str]:
    """Words in lines of at most :data:`WIDTH` columns, the first behind ``lead``, the others below it."""
    line = lead
    for word in words:
        if len(line) + len(word) + 1 > WIDTH and line.strip():
            yield line
            line = " " * len(lead)
        line += word if len(line) == len(lead) else f" {word}"
    yield line


def table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """Lines of text: columns two spaces apart, each as wide as its longest cell and aligned to its side, < or >."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        yield "  " + "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True))
