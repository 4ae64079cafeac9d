"""What rounding costs the gated delta rule by chunks; see delta_rounding.py."""

from __future__ import annotations

import torch
from delta_rounding import CASES, awkward, chunked, off, operands

from makeready.kernels.contract import CONTRACTS
from makeready.kernels.delta import rule

assert rule.CHUNK  # registers the op


def test_what_rounding_costs_in_bf16_is_what_is_allowed() -> None:
    allowed = CONTRACTS["chunk_delta_rule"].tolerance
    most = [0.0, 0.0]
    for seed, case in enumerate(CASES):
        x = awkward(seed, *case, "random" if seed % 3 else "keys")
        x[2] = x[2].bfloat16().float()
        y, s = chunked(*x, torch.bfloat16)
        wanted = operands(x, 0, torch.bfloat16).widened().run()
        most[0] = max(most[0], off(y[0].bfloat16(), wanted["y"]))
        most[1] = max(most[1], off(s[0], wanted["state"][1, 0]))
    assert most[0] < allowed.bfloat16
    assert most[1] < allowed.float32
    assert most[0] > allowed.bfloat16 / 4, "what is allowed is far more than what is needed"


def test_the_model_without_rounding_is_the_recurrence() -> None:
    for seed, case in enumerate(CASES[::5]):
        x = awkward(seed, *case, "random" if seed % 3 else "keys")
        y, s = chunked(*x, torch.float32, exact=True)
        wanted = operands(x, 1, torch.float32).widened().run()
        assert off(y[1], wanted["y"]) < 2e-4
        assert off(s[1], wanted["state"][1, 0]) < 2e-4
