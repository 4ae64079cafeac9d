"""Whether a plan and a checkpoint belong together."""

from __future__ import annotations

from makeready.graphs.checkpoint.base import FINGERPRINT_EXEMPT, Checkpoint
from makeready.graphs.plan import Plan, PlanError


def check_checkpoint(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that the plan was not made for.

    Raises:
        PlanError: naming the first config field, or the tensor, that differs.
    """
    if checkpoint.format == "dummy":
        checkpoint.declare(  # type: ignore[attr-defined]
            {p.source: w.param.source_shape(p) for w in plan.weights for p in w.param.pieces}
        )
    if checkpoint.fingerprint() == plan.checkpoint:
        # A plan that says so may still ask for rows that there are not.
        for weight in plan.weights:
            for piece in weight.param.pieces:
                info = checkpoint.tensors.get(piece.source)
                if info is None or not weight.param.fits(piece, info.shape):
                    raise PlanError(
                        f"the plan contradicts its checkpoint: {checkpoint.path} has no rows {piece.start} to "
                        f"{piece.stop} of {piece.source} for {weight.param.name}; compile a plan for this checkpoint"
                    )
        return
    for name in sorted({*plan.config, *checkpoint.config} - FINGERPRINT_EXEMPT):
        made_for, given = plan.config.get(name), checkpoint.config.get(name)
        if made_for != given:
            raise PlanError(
                f"the plan is for another checkpoint: its config has {name}={made_for!r}, "
                f"{checkpoint.path} has {given!r}; compile a plan for this checkpoint"
            )
    for weight in plan.weights:
        for piece in weight.param.pieces:
            info = checkpoint.tensors.get(piece.source)
            if info is None or not weight.param.fits(piece, info.shape):
                found = "lacks it" if info is None else f"has it as {info.dtype}{list(info.shape)}"
                raise PlanError(
                    f"the plan is for another checkpoint: it needs tensor {piece.source}, "
                    f"{checkpoint.path} {found}; compile a plan for this checkpoint"
                )
    raise PlanError(
        f"the plan is for another checkpoint: {checkpoint.path} stores its tensors in other dtypes or has "
        "other tensors besides; compile a plan for this checkpoint"
    )
