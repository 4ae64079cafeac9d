"""What steps that verify drafts take beside decode steps, by the plan's own costs: the scheduler goes by it."""

from __future__ import annotations

from dataclasses import replace

from makeready.graphs.inspect.step_time import Row, StepTimes
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import DECODE, VERIFY


def compared(plan: Plan) -> Plan:
    """``plan``, whose steps of kind ``verify`` know their ratios; as it is where it has none.

    Steps are full and have the context of the plan's traffic.
    """
    step = plan.steps.get(VERIFY)
    if step is None:
        return plan
    assert step.each is not None
    times, table = StepTimes(plan), BucketTable(plan.buckets)
    context = min(max(int(plan.options.traffic.get("context", 1024)), step.each), plan.limits.context_len)
    ratios = {}
    for bucket in (bucket for bucket in plan.buckets if bucket.phase == VERIFY):
        plainly = times.alike(table.covering(DECODE, bucket.rows, bucket.rows), bucket.rows, context)
        ratios[bucket.rows] = times.seconds(bucket, [Row(step.each, context)] * bucket.rows) / plainly
    return replace(plan, steps={**plan.steps, VERIFY: replace(step, ratios=ratios)})
