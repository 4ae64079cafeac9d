"""Whether a plan and a checkpoint belong together."""

from __future__ import annotations

from makeready.graphs.checkpoint.base import FINGERPRINT_EXEMPT, Checkpoint
from makeready.graphs.checkpoint.paired import FIELD
from makeready.graphs.checkpoint.unread import check_unread
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.reads import declare_needs, needs


def check_checkpoint(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that the plan was not made for.

    Plain dtypes and GGUF's blocks stand for each other: all are brought to the plan's dtypes when loaded.
    A warning names tensors that the plan does not read.

    Raises:
        PlanError: naming the first config field, or the tensor, that differs.
        CheckpointError: the checkpoint has tensors without which its result is wrong.
    """
    params = [weight.param for weight in plan.weights]
    wanted = needs(params)
    declare_needs(checkpoint, wanted)
    if FIELD in plan.config and FIELD not in checkpoint.config:
        raise PlanError(
            f"the plan drafts with a second checkpoint (speculative.method={plan.options.speculative.method}); "
            "add speculative.checkpoint=PATH"
        )
    if FIELD in checkpoint.config and FIELD not in plan.config:
        raise PlanError("the plan drafts with no second checkpoint; leave speculative.checkpoint out")
    for name in sorted({*plan.config, *checkpoint.config} - FINGERPRINT_EXEMPT):
        made_for, given = plan.config.get(name), checkpoint.config.get(name)
        if made_for != given:
            raise PlanError(
                f"the plan is for another checkpoint: its config has {name}={made_for!r}, "
                f"{checkpoint.path} has {given!r}; compile a plan for this checkpoint"
            )
    suits: tuple[object, ...] = ()
    for source, need in wanted.items():
        info = checkpoint.find(source)
        if info is not None and suits == (id(need), info.shape, info.kind):
            continue  # as the tensor before it, which one piece stands for as well
        if info is None or not need.fits(info.shape, exactly=True) or info.kind not in need.kinds:
            found = "lacks it" if info is None else f"has it as {info.dtype}{list(info.shape)}"
            raise PlanError(
                f"the plan is for another checkpoint: it needs tensor {source}, "
                f"{checkpoint.path} {found}; compile a plan for this checkpoint"
            )
        suits = (id(need), info.shape, info.kind)
    check_unread(checkpoint, wanted)
