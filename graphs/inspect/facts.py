"""What a plan is, in a few labelled lines: shared by the text and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from makeready.graphs.inspect import units
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import LoweredProgram
from makeready.graphs.plan.targets import target_of

EIGHT_BITS = ("float8_e4m3fn", "int8")


def facts(plan: Plan, memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and value of every fact; ``memory`` is the plan's memory analysis."""
    options, limits = plan.options, plan.limits
    target = target_of(plan)
    launches = ", ".join(f"{phase} {count_text(program)}" for phase, program in plan.programs.items())
    peak = units.rate(target.rate(options.weight_dtype), "FLOP")
    return [
        ("architecture", plan.architecture),
        ("parameters", f"{units.count(memory['parameters'])} ({memory['parameters']:,})"),
        ("dtypes", dtypes(plan)),
        (
            "target",
            f"{plan.target} on {target.device.name}: {units.rate(target.bandwidth, 'B')}, "
            f"{peak} at {units.dtype(options.weight_dtype)}, {units.seconds(target.launch_seconds)} a launch",
        ),
        ("limits", f"{limits.max_rows} rows, {limits.max_tokens:,} tokens a step, context {limits.context_len:,}"),
        ("launches", launches),
        *tuning(plan),
        ("plan", artifact.digest(plan)),
        ("checkpoint", plan.checkpoint),
    ]  # fmt: skip


def count_text(program: LoweredProgram) -> str:
    """Launches of a program, and how many of them are in the side lane."""
    beside = sum(lane.stop - lane.first for lane in program.lanes)
    return f"{len(program.launches)}" + (f" ({beside} beside others)" if beside else "")


def tuning(plan: Plan) -> list[tuple[str, str]]:
    """Where the plan was tuned, and how many choices differ from the planner's there."""
    told = [f"{len(table)} choices changed on {device}" for device, table in sorted(plan.tuned.items())]
    return [("tuned", ", ".join(told))] if told else []


def dtypes(plan: Plan) -> str:
    """Dtypes of weights, activations and cache: one name where all agree. Where linears are quantized they
    take 8-bit activations, too.
    """
    options = plan.options
    quantized = next((w.param.spec.dtype for w in plan.weights if w.param.spec.dtype in EIGHT_BITS), "")
    named = {
        **({"linears": quantized} if quantized else {}),
        "other weights" if quantized else "weights": options.weight_dtype,
        "activations": options.activation_dtype,
        "KV": options.kv_dtype,
    }
    if len(set(named.values())) == 1:
        return f"{units.dtype(options.weight_dtype)} throughout"
    return ", ".join(f"{what} {units.dtype(name)}" for what, name in named.items())


def passes(plan: Plan) -> dict[str, bool]:
    """Every optional rewrite, in the order they run, and whether the plan was made with it."""
    from makeready.graphs.passes import REWRITES

    return {name: name not in plan.options.disabled_passes for name in REWRITES}
