"""Whether a plan and a checkpoint belong together."""

from __future__ import annotations

from makeready.graphs.checkpoint.base import BLOCKS, FINGERPRINT_EXEMPT, PLAIN, Checkpoint
from makeready.graphs.checkpoint.unread import check_unread
from makeready.graphs.plan import Plan, PlanError

FP8 = "float8_e4m3fn"


def check_checkpoint(plan: Plan, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that the plan was not made for.

    Plain dtypes and GGUF's blocks stand for each other: all are brought to the plan's dtypes when loaded.
    A warning names tensors that the plan does not read.

    Raises:
        PlanError: naming the first config field, or the tensor, that differs.
        CheckpointError: the checkpoint has tensors without which its result is wrong.
    """
    if checkpoint.format == "dummy":
        checkpoint.declare(  # type: ignore[attr-defined]
            {p.source: w.param.source_shape(p) for w in plan.weights for p in w.param.pieces}
        )
    for name in sorted({*plan.config, *checkpoint.config} - FINGERPRINT_EXEMPT):
        made_for, given = plan.config.get(name), checkpoint.config.get(name)
        if made_for != given:
            raise PlanError(
                f"the plan is for another checkpoint: its config has {name}={made_for!r}, "
                f"{checkpoint.path} has {given!r}; compile a plan for this checkpoint"
            )
    pieces = [(weight.param, piece) for weight in plan.weights for piece in weight.param.pieces]
    rows: dict[str, int] = {}
    for _, piece in pieces:
        rows[piece.source] = max(piece.stop, rows.get(piece.source, 0))
    for param, piece in pieces:
        info = checkpoint.tensors.get(piece.source)
        kinds = (PLAIN, BLOCKS) if param.assembled.dtype != FP8 else (FP8,)
        whole = info is not None and (piece.repeated or info.shape[:1] == (rows[piece.source],))
        if info is None or not param.fits(piece, info.shape) or not whole or info.kind not in kinds:
            found = "lacks it" if info is None else f"has it as {info.dtype}{list(info.shape)}"
            raise PlanError(
                f"the plan is for another checkpoint: it needs tensor {piece.source}, "
                f"{checkpoint.path} {found}; compile a plan for this checkpoint"
            )
    check_unread(checkpoint, rows)
