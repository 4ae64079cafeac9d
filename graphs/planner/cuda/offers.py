"""Which of the ways to run a call a plan carries: the best few that the target's resources allow.

Implementations say what they would launch, best first; only compiling tells registers and shared memory. So
the best are compiled, those that spill or do not fit are dropped, and the next take their places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.targets import Target
from makeready.graphs.planner.cuda.aot import Compiled, Kernel, kernel_of
from makeready.graphs.planner.cuda.pool import compile_each
from makeready.kernels import registry
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall

_GRID_LIMIT = (2**31 - 1, 65535, 65535)

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Offer:
    """A candidate for a call, the kernels of its launches in order; ``tuned_only`` as its implementation is."""

    name: str
    call: OpCall
    candidate: Candidate
    kernels: tuple[Kernel, ...]
    tuned_only: bool = False


@dataclass
class _Search:
    """The offers of one call: those that are in, those being tried, and the rest."""

    rest: Iterator[Offer]
    taken: list[Offer] = field(default_factory=list)
    tried: list[Offer] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def select(
    calls: Mapping[Key, OpCall],
    target: Target,
    *,
    keep: int,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    alike: Mapping[Key, Hashable] | None = None,
    optional: Collection[Key] = (),
) -> tuple[dict[Key, list[Offer]], dict[Kernel, Compiled], tuple[str, ...]]:
    """The best ``keep`` offers of every call, their machine code, and a line for each offer that was dropped.

    A call without an implementation has no offers.

    Args:
        cache: folder of compiled kernels.
        progress: told how many of how many kernels are compiled; the latter grows where offers are dropped.
        alike: calls that have an equal value here get the same offers: the very same kernels.
        optional: calls that need not have an offer.

    Raises:
        PlanError: none of a call's offers compiles within the target's resources, or an implementation is wrong:
            its launch does not suit its kernel, or is dependent and never waits.
    """
    offered = {key: _offered(call, target, keep, key in optional) for key, call in calls.items()}
    if alike:
        offered |= _joined({key: list(offered[key]) for key in alike}, alike)
    searches = {key: _Search(offers) for key, offers in offered.items()}
    compiled: dict[Kernel, Compiled | PlanError] = {}
    while wanted := _next_round(searches, keep, compiled, target):
        done = len(compiled)

        def onward(part: int, of: int, done: int = done) -> None:
            progress(done + part, done + of)

        compiled |= compile_each(wanted, cache, onward)
    for key, search in searches.items():
        if search.refused and not search.taken and key not in optional:
            raise PlanError(search.refused[0])
    offers = {key: search.taken for key, search in searches.items()}
    # Compilers' reasons may name temporary files, which must not enter a plan.
    lines = {
        reason.partition(" does not compile:") for search in searches.values() for reason in search.refused
    }
    dropped = sorted({where + by.rstrip(":") for where, by, _ in lines})
    used = dict.fromkeys(kernel for taken in offers.values() for offer in taken for kernel in offer.kernels)
    return offers, {k: made for k in used if isinstance(made := compiled[k], Compiled)}, tuple(dropped)


def _offered(call: OpCall, target: Target, keep: int, optional: bool) -> Iterator[Offer]:
    """All candidates: each implementation's best first, then each one's second.

    The implementation whose best offer should take the least time comes first; where one does not know its own, they
    come in the order of their registration. Those for tuning alone come last, and where a plan keeps one offer not at
    all, unless the call must have one.
    """
    offered = [(kernel, kernel.candidates(call)) for kernel in registry.cuda_kernels(call.op)]
    offered = [(kernel, found) for kernel, found in offered if found]
    if all(found[0].seconds > 0 for _, found in offered):
        offered.sort(key=lambda one: one[1][0].seconds)
    timed = [one for one in offered if not one[0].tuned_only]
    if keep > 1 or not (timed or optional):
        timed += [one for one in offered if one[0].tuned_only]
    turns = itertools.zip_longest(*([(kernel, offer) for offer in found] for kernel, found in timed))
    for kernel, candidate in filter(None, itertools.chain.from_iterable(turns)):
        kernels = tuple(_kernel(launch, call, target) for launch in candidate.launches)
        yield Offer(f"{kernel.name}/{candidate.name}", call, candidate, kernels, kernel.tuned_only)


def _joined(offered: Mapping[Key, list[Offer]], alike: Mapping[Key, Hashable]) -> dict[Key, Iterator[Offer]]:
    """The offers that all calls of a group have, in an order that is best for the group.

    That is the sum over its calls of how many times longer each takes than it would in its own best offer, so that
    few rows, where weights are streamed, count as much as many.

    Raises:
        PlanError: the calls of a group have no offer in common.
    """
    groups: dict[Hashable, list[Key]] = {}
    for key in offered:
        groups.setdefault(alike[key], []).append(key)
    joined: dict[Key, Iterator[Offer]] = {}
    for keys in groups.values():
        # An address may be known to be aligned in one call alone; which it is does not make an offer another one.
        found: list[dict[tuple[Kernel, ...], Offer]] = []
        for key in keys:
            by_kernels: dict[tuple[Kernel, ...], Offer] = {}
            for offer in offered[key]:
                by_kernels.setdefault(tuple(replace(k, aligned=()) for k in offer.kernels), offer)
            found.append(by_kernels)
        common = [kernels for kernels in found[0] if all(kernels in offers for offers in found)]
        if not common and all(found):
            raise PlanError(
                f"{offered[keys[0]][0].call.op} has no way to run that serves all batch shapes; compile without "
                "plan.deterministic, or lower plan.max_tokens"
            )
        best = [
            min((offer.candidate.seconds for offer in offers.values()), default=0.0) or 1.0
            for offers in found
        ]
        common.sort(key=lambda k: sum(w[k].candidate.seconds / s for w, s in zip(found, best, strict=True)))
        for key, offers in zip(keys, found, strict=True):
            joined[key] = iter([_aligned_alike(offers[k], [others[k] for others in found]) for k in common])
    return joined


def _aligned_alike(offer: Offer, others: list[Offer]) -> Offer:
    """``offer`` with kernels that rely on no alignment that one of ``others`` lacks."""
    kernels = (
        replace(mine, aligned=tuple(n for n in mine.aligned if all(n in k.aligned for k in theirs)))
        for mine, *theirs in zip(offer.kernels, *(other.kernels for other in others), strict=True)
    )
    return replace(offer, kernels=tuple(kernels))


def _kernel(launch: DeviceLaunch, call: OpCall, target: Target) -> Kernel:
    for blocks, limit in zip(launch.grid, _GRID_LIMIT, strict=True):
        if not 1 <= blocks <= limit:
            raise PlanError(f"{launch.function} for {call.op}: a grid of {launch.grid} blocks cannot be run")
    return kernel_of(launch, call, target.arch)


def _next_round(
    searches: Mapping[Key, _Search],
    keep: int,
    compiled: Mapping[Kernel, Compiled | PlanError],
    target: Target,
) -> list[Kernel]:
    """Judge the offers that were tried and take the next where some are missing; kernels not compiled yet."""
    wanted: dict[Kernel, None] = {}
    for search in searches.values():
        while True:
            for offer in search.tried:
                reason = _refusal(offer, compiled, target)
                search.refused.append(reason) if reason else search.taken.append(offer)
            search.tried = list(itertools.islice(search.rest, keep - len(search.taken)))
            missing = [k for offer in search.tried for k in offer.kernels if k not in compiled]
            if missing or not search.tried:
                break
        wanted |= dict.fromkeys(missing)
    return list(wanted)


def _refusal(offer: Offer, compiled: Mapping[Kernel, Compiled | PlanError], target: Target) -> str:
    """Why the target cannot run ``offer``; empty where it can."""
    for launch, kernel in zip(offer.candidate.launches, offer.kernels, strict=True):
        made = compiled[kernel]
        where = f"{launch.function} of {offer.call.op}/{offer.name}"
        if isinstance(made, PlanError):
            return str(made)
        if made.spill_bytes > launch.local_bytes:
            return (
                f"{where} spills: {made.spill_bytes} bytes of local memory a thread, "
                f"{launch.local_bytes} are allowed; use smaller tiles or more warps"
            )
        if made.shared > target.shared_bytes:
            return (
                f"{where} needs {made.shared} bytes of shared memory, {target.name} has {target.shared_bytes} "
                "for a block; use smaller tiles or fewer stages"
            )
        if launch.grid[0] % made.cluster:
            raise PlanError(
                f"{where} has {launch.grid[0]} blocks along x, which is no multiple of its clusters of {made.cluster}"
            )
        if launch.dependent and not made.waits:
            raise PlanError(
                f"{where} is dependent and never waits for the kernels before it; call gdc_wait before the "
                "first access to what they touch"
            )
    return ""
