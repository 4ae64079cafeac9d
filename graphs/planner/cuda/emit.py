"""From launches to kernel nodes: what every call of a program runs on the GPU, in every bucket.

Calls that are alike but for the names of their operands form an op class. For each class and bucket the
registered implementations are asked for candidates, the best of which are compiled (offers.py); nodes refer to
their kernels by key.

Scratch is one region for all calls of a lane: first the counters, which stay zero between kernels, then the rest,
which any call may leave in any state. Both are as large as the greediest candidate needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from makeready.graphs.checkpoint.paired import DRAFT
from makeready.graphs.plan.memory import align
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.program import (
    Binary,
    Launch,
    LoweredProgram,
    OpClass,
)
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import Target
from makeready.graphs.planner.chains import without_idle
from makeready.graphs.planner.cuda.classes import CallClass, classify, signature
from makeready.graphs.planner.cuda.edges import early_operands, joins
from makeready.graphs.planner.cuda.nodes import binary_key, binary_of, candidates_of, rest_start
from makeready.graphs.planner.cuda.offers import select
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import (
    OpCall,
)
from makeready.kernels.spec import DTYPE_BYTES, TensorSpec

_Key: TypeAlias = tuple[str, int, Bucket]  # phase, class, bucket


@dataclass(frozen=True)
class Emitted:
    """Programs with their op classes, and what the classes' nodes refer to.

    Attributes:
        scratch: bytes of the scratch region.
        arena: bytes that the arena must have at least.
        dropped: a line for each way to run a call that the target's resources ruled out.
    """

    programs: Mapping[str, LoweredProgram]
    binaries: Mapping[str, Binary]
    cubins: Mapping[str, bytes]
    scratch: int
    arena: int
    dropped: tuple[str, ...]


def emit(
    programs: Mapping[str, LoweredProgram],
    specs: Mapping[str, Mapping[str, TensorSpec]],
    buckets: Sequence[Bucket],
    target: Target,
    *,
    context: int,
    keep: int,
    cache: Path,
    deterministic: bool = False,
    reports: Collection[str] = (),
    guessing: Mapping[str, Collection[str]] = MappingProxyType({}),
    loads: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Emitted:
    """Op classes of all programs, and the machine code that they launch.

    Args:
        programs: lowered for ``target``, without classes.
        specs: of every value that is no arena buffer, by program.
        context: tokens of context a row that cost models assume.
        keep: at most so many candidates a class and bucket.
        cache: folder of compiled kernels.
        deterministic: every call runs the same kernels in all buckets and phases, of those that compute a row
            from that row alone.
        reports: results that only some kinds of step have; what makes them need not run in all.
        guessing: by program, values of a second model: how it guesses need not be the same in all.
        loads: which of ``programs`` make parameters: each has a place of the arena to itself, and none computes
            tokens.
        progress: told how many of how many kernels are compiled.

    Raises:
        PlanError: an op has no implementation for the target, or none that it has the resources for, or a kernel
            is called dependent and never waits; or there is none that serves all buckets.
    """
    classes: dict[str, list[CallClass]] = {}
    classified: dict[str, LoweredProgram] = {}
    for phase, program in programs.items():
        classified[phase], classes[phase] = classify(program, specs[phase], spare=phase not in loads)
    if deterministic:
        steps = {phase: program for phase, program in classified.items() if phase not in loads}
        _check_alike(steps, classes, reports, guessing)
    same = set(programs) - set(loads) if deterministic else set()
    calls, alike = _calls(classes, buckets, context, target, alike=same)
    chained = {
        (phase, chain.launch.op_class) for phase, program in classified.items() for chain in program.chains
    }
    offers, compiled, dropped = select(
        calls,
        target,
        keep=keep,
        cache=cache,
        progress=progress,
        alike=alike,
        optional={key for key in calls if key[:2] in chained},
    )
    lacking = {
        calls[key].op: key for key, found in reversed(offers.items()) if not found and key[:2] not in chained
    }
    if lacking:
        phase, index, bucket = lacking[min(lacking)]
        raise PlanError(
            f"no {'deterministic ' if deterministic else ''}{target.name} implementation for "
            f"{', '.join(sorted(lacking))}; for instance {min(lacking)} in "
            f"{bucket}: {signature(classes[phase][index])}"
        )
    everything = list(itertools.chain(*offers.values()))
    names = {kernel: binary_key(kernel, made) for kernel, made in compiled.items()}
    counters = align(max((offer.candidate.zeroed for offer in everything), default=0))
    rest = max((offer.candidate.scratch - rest_start(offer.candidate) for offer in everything), default=0)
    for phase, program in classified.items():
        made_classes = tuple(
            OpClass(
                one.op,
                {
                    str(bucket): candidates_of(
                        offers[phase, i, bucket],
                        compiled,
                        names,
                        counters,
                        apart=keep > 1 and (phase, i) in chained,
                    )
                    for bucket in buckets
                    if bucket.phase == phase
                },
            )
            for i, one in enumerate(classes[phase])
        )
        early = {
            i: early_operands(
                offer for key, found in offers.items() if key[:2] == (phase, i) for offer in found
            )
            for i in range(len(made_classes))
        }
        made = replace(program, classes=made_classes, joins=joins(program, early))
        classified[phase] = without_idle(made)
    return Emitted(
        programs=classified,
        binaries={names[k]: binary_of(made) for k, made in sorted(compiled.items(), key=lambda item: names[item[0]])},
        cubins={names[k]: made.cubin for k, made in compiled.items()},
        scratch=align(counters + rest),
        arena=max((_reach(program) for phase, program in classified.items() if phase not in loads), default=0),
        dropped=dropped,
    )  # fmt: skip


def _calls(
    classes: Mapping[str, Sequence[CallClass]],
    buckets: Sequence[Bucket],
    context: int,
    target: Target,
    *,
    alike: Collection[str],
) -> tuple[dict[_Key, OpCall], dict[_Key, tuple[object, ...]]]:
    """The call of every class in every bucket; and of those in phases that must run ``alike``, which those are."""
    keys = [(b.phase, index, b) for b in buckets for index in range(len(classes[b.phase]))]
    same = {key: classes[key[0]][key[1]].alike for key in keys if key[0] in alike}
    most = max(bucket.rows for bucket in buckets)
    calls = {
        key: classes[key[0]][key[1]].call(key[2], context, target, most_rows=most if key in same else 0)
        for key in keys
    }
    return calls, same


def _check_alike(
    programs: Mapping[str, LoweredProgram],
    classes: Mapping[str, Sequence[CallClass]],
    reports: Collection[str],
    guessing: Mapping[str, Collection[str]],
) -> None:
    """Check that a token's results come from the same classes of calls in all phases, in the same order.

    Raises:
        PlanError: the buffers of one phase are laid out so that its kernels may be others.
    """
    made = {
        phase: [
            (classes[phase][launch.op_class].alike, launch)
            for launch in program.launches
            if CONTRACTS[launch.op].selects_rows is None
            and not classes[phase][launch.op_class].says_what_runs
            and not set(reports) & set(launch.results.values())
            and not _guesses(launch, guessing.get(phase, ()))
        ]
        for phase, program in programs.items()
    }
    first, *others = made
    for phase in others:
        for (one, launch), (other, _) in zip(made[first], made[phase], strict=True):
            if one != other:
                raise PlanError(
                    f"{launch.op} is laid out differently in {first} and {phase} steps, "
                    "so their kernels may differ; compile without plan.deterministic"
                )


def _guesses(launch: Launch, values: Collection[str]) -> bool:
    """Whether a launch is a second model's, whose ``values`` these are."""
    named = (*launch.operands.values(), *launch.results.values())
    return any(value in values or value.startswith(DRAFT) for value in named)


def _reach(program: LoweredProgram) -> int:
    """Bytes of the arena that tensor maps reach to: they may go beyond the last row of an operand."""
    ends = [0]
    for launch in (*program.launches, *(chain.launch for chain in program.chains)):
        names = {**launch.operands, **launch.results}
        for choices in program.classes[launch.op_class].candidates.values():
            for argument in (a for choice in choices for node in choice.nodes for a in node.arguments):
                buffer = program.buffers.get(names.get(argument.operand, ""))
                if argument.kind in ("descriptor", "map") and buffer is not None:
                    last = sum(
                        (int(n) - 1) * s for n, s in zip(argument.shape, argument.strides, strict=True)
                    )
                    ends.append(buffer.offset + (last + 1) * DTYPE_BYTES[argument.dtype])
    return align(max(ends))
