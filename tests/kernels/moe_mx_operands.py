"""Operands of products with experts' weights in MXFP4, for tests of their kernels."""

from __future__ import annotations

import torch
from case import Random
from moe_operands import NAN, expert_weights
from mx_inputs import mx_weights

GATES = {"grouped_clamped_swiglu_mx": {"alpha": 1.702, "limit": 7.0}}  # attributes, as gpt-oss has them


def operands(
    kind: str, shape: tuple[int, ...], *, gathered: bool, bias: bool, least: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Operands of a call; ``least``: added to the exponents of all scales."""
    tokens, experts, k, outputs, inputs = shape
    random = Random(seed)
    made = expert_weights(tokens, experts, k, outputs, inputs, kind, gathered, seed=seed)
    wide = torch.full((made["x"].shape[0], inputs + 64), NAN, dtype=torch.bfloat16)
    wide[:, :inputs] = made["x"]
    packed = [mx_weights(random, outputs, inputs) for _ in range(experts)]
    stacked = {name: torch.stack([one[name] for one in packed]) for name in packed[0]}
    stacked["weight_scale"] += least
    stacked["weight_scale"][made["start"][1:] == made["start"][:-1]] = 255
    order = {name: made[name] for name in ("order", "start")}
    added = {"bias": random.normal(experts, outputs, dtype="bfloat16")} if bias else {}
    return {"x": wide[:, :inputs], **stacked, **order, **added}
