"""The plan that a model runs under: given, found in the cache or compiled; and what it allows the scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.options import SchedulerOptions
from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.checkpoint.paired import Beside
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import Plan

Report = Callable[[str], None]


def second_of(options: dict[str, Any]) -> tuple[dict[str, Any], Beside]:
    """The planner's options, and where the checkpoint is that drafts: ``checkpoint`` of ``speculative``."""
    given = options.get("speculative")
    if not isinstance(given, Mapping) or not {"checkpoint", "model"} & given.keys():
        return options, Beside()
    asked = {name: value for name, value in given.items() if name not in ("checkpoint", "model")}
    others = {name: value for name, value in options.items() if name != "speculative"}
    path = given.get("checkpoint")
    return others | ({"speculative": asked} if asked else {}), Beside(path and str(path), given.get("model"))


def plan_of(
    checkpoint: Checkpoint, plan: Plan | str | Path | None, options: dict[str, Any], report: Report
) -> Plan:
    """The plan that is given, or that the options ask for.

    Raises:
        RequestError: options beside a plan, or unknown ones.
        PlanError, UnsupportedModelError: as the planner's.
    """
    if plan is not None:
        if options:
            raise RequestError(
                f"{', '.join(sorted(options))} cannot be chosen for a plan that is already compiled; "
                "leave them out, or leave out plan"
            )
        return plan if isinstance(plan, Plan) else artifact.load(plan)
    # The planner needs torch; a plan that is ready does not.
    from makeready.graphs.planner.compile import Request as PlanRequest
    from makeready.graphs.planner.compile import compile_plan
    from makeready.graphs.planner.plan_cache import cached_plan

    try:
        request = PlanRequest(**options)
    except TypeError as error:
        raise RequestError(f"there is no such plan option: {error}") from None
    return cached_plan(checkpoint, request, lambda: compile_plan(checkpoint, request), report)[0]


def shareable(plan: Plan, options: SchedulerOptions, report: Report) -> SchedulerOptions:
    """The options, without the prefix cache where keys depend on more than the tokens before them."""
    operands = {
        name
        for program in plan.programs.values()
        for launch in program.launches
        if launch.op != "sample"
        for name in launch.operands.values()
    }
    if not options.prefix_cache or "prompt_len" not in operands:
        return options
    # Dynamic rotary scaling goes by the length of the prompt: equal beginnings have different keys.
    report("prefixes are not shared: the model's position encoding depends on the length of the prompt")
    return dataclasses.replace(options, prefix_cache=False)
