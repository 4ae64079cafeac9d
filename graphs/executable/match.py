"""Whether a plan and a checkpoint belong together."""

from __future__ import annotations

from makeready.graphs.checkpoint.base import FINGERPRINT_EXEMPT, Checkpoint
from makeready.graphs.plan import Plan, PlanError
from makeready.graphs.reads import needs


def check_checkpoint(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that the plan was not made for.

    Raises:
        PlanError: naming the first config field, or the tensor, that differs.
    """
    params = [weight.param for weight in plan.weights]
    if checkpoint.format == "dummy":
        checkpoint.declare({source: need.shape for source, need in needs(params).items()})  # type: ignore[attr-defined]
    if checkpoint.fingerprint() == plan.checkpoint:
        return
    for name in sorted({*plan.config, *checkpoint.config} - FINGERPRINT_EXEMPT):
        made_for, given = plan.config.get(name), checkpoint.config.get(name)
        if made_for != given:
            raise PlanError(
                f"the plan is for another checkpoint: its config has {name}={made_for!r}, "
                f"{checkpoint.path} has {given!r}; compile a plan for this checkpoint"
            )
    for source, need in needs(params).items():
        info = checkpoint.tensors.get(source)
        if info is None or not need.fits(info.shape):
            found = "lacks it" if info is None else f"has it as {info.dtype}{list(info.shape)}"
            raise PlanError(
                f"the plan is for another checkpoint: it needs tensor {source}, "
                f"{checkpoint.path} {found}; compile a plan for this checkpoint"
            )
    raise PlanError(
        f"the plan is for another checkpoint: {checkpoint.path} stores its tensors in other dtypes or has "
        "other tensors besides; compile a plan for this checkpoint"
    )
