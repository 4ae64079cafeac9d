"""What steps should take by the cost model of the plan, computed in a process of its own.

The cost model needs the planner, and it torch, which neither the engine on a GPU nor the server has to load.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import msgspec

from makeready.engine.remote.messages import Load
from makeready.graphs.children import run
from makeready.graphs.plan import artifact
from makeready.graphs.plan.plan import Plan, PlanError


async def predicted(load: Load) -> dict[str, Any] | None:
    """Seconds of a full step of every bucket.

    Args:
        load: what the engine was told.

    Returns:
        ``contexts``: tokens of context a row, the least and the most; ``buckets``: for each, seconds at either. None
        where the plan is kept nowhere.
    """
    command = [sys.executable, "-m", __name__, msgspec.json.encode(load).decode()]
    done = await asyncio.to_thread(run, command)
    return json.loads(done.stdout) if done.returncode == 0 else None


def plan_of(load: Load) -> Plan:
    """The plan that an engine runs, which is not compiled again.

    Raises:
        PlanError: it is kept nowhere.
    """
    if load.plan is not None:
        return artifact.load(load.plan)
    from makeready.graphs.checkpoint.base import open_checkpoint
    from makeready.graphs.plan.buckets import Traffic
    from makeready.graphs.planner.compile import Request
    from makeready.graphs.planner.plan_cache import cache_folder, plan_key

    traffic, passes = Traffic(**load.request["traffic"]), tuple(load.request["disabled_passes"])
    request = Request(**{**load.request, "traffic": traffic, "disabled_passes": passes})
    checkpoint = load.beside.open(open_checkpoint(load.checkpoint, config=load.model))
    return artifact.load(cache_folder() / "plans" / plan_key(checkpoint, request))


def seconds_of(plan: Plan) -> dict[str, Any]:
    """See :func:`predicted`."""
    contexts = sorted({1, plan.limits.context_len})
    costs = [plan.cost_analysis(context) for context in contexts]
    buckets = {str(bucket): [cost[bucket]["seconds"] for cost in costs] for bucket in plan.buckets}
    return {"contexts": contexts, "buckets": buckets}


def main() -> int:
    """Write what is predicted for the Load that is the first argument; returns the exit code."""
    os.nice(10)
    try:
        plan = plan_of(msgspec.json.decode(sys.argv[1], type=Load))
    except PlanError as error:
        print(error, file=sys.stderr)
        return 1
    json.dump(seconds_of(plan), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
