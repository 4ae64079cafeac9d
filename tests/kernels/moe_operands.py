"""Awkward routings and operands of products with experts' weights, for tests of their kernels."""

from __future__ import annotations

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.moe import experts, experts_silu, route

NAN = float("nan")
assert isinstance(route.sort_by_expert, Contract)
assert experts
assert experts_silu


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routing(tokens: int, count: int, k: int, kind: str, seed: int = 0) -> torch.Tensor:
    """``[tokens, k]`` experts of ``count``: distinct ones of a token, -1 for tokens of no row.

    Args:
        kind: "spread" evenly with every fifth token of no row; "many" the same with all of rows; "one" gets the
            first entry of all; "nobody" is of a row; "single", only the last token is; "none", the even experts
            have no entry.
    """
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(tokens, count, generator=generator)
    if kind == "none":
        some[:, ::2] -= 1
    made = some.argsort(1, descending=True)[:, : min(k, count)]
    if made.shape[1] < k:  # not what routers do, but nothing forbids it
        made = torch.cat((made, made[:, : k - made.shape[1]]), 1)
    if kind == "one":
        made = made.where(made != count - 1, made[:, :1])
        made[:, 0] = count - 1
    nobody = {"spread": slice(3, None, 5), "nobody": slice(None), "single": slice(None, -1)}.get(kind)
    if nobody is not None:
        made[nobody] = -1
    return made.int()


def expert_weights(
    tokens: int,
    count: int,
    k: int,
    outputs: int,
    inputs: int,
    kind: str,
    gathered: bool,
    act: str = "bfloat16",
    stored: str = "bfloat16",
    *,
    scales: str = "",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Operands of a product: rows of x and experts that no entry is of, and their scales, are NaN.

    Args:
        gathered: rows of x are the entries, in order.
        scales: "channel" or "block": 8-bit floats; "int8": integers with those of channels.
    """
    assert isinstance(route.sort_by_expert, Contract)
    expert = routing(tokens, count, k, kind, seed)
    order, _, start = route.sort_by_expert.reference(expert, experts=count)
    rows = tokens * k if gathered else tokens
    x, weight = random(rows, inputs, seed=seed + 1), random(count, outputs, inputs, seed=seed + 2)
    made = {"order": order, "start": start}
    if scales:
        shapes = ((rows, 1), (count, outputs))
        if scales == "block":
            shapes = ((rows, inputs // 128), (count, -(-outputs // 128), inputs // 128))
        if scales == "int8":
            x, weight = (t.mul(60).clamp(-128, 127).round().to(torch.int8) for t in (x, weight))
        else:
            x, weight = (t.mul(60).clamp(-448, 448).to(torch.float8_e4m3fn) for t in (x, weight))
        for place, (name, shape) in enumerate(zip(("x_scale", "weight_scale"), shapes, strict=True)):
            made[name] = random(*shape, seed=seed + place).exp() / 1000
    else:
        x, weight = x.to(getattr(torch, act)), (weight / inputs**0.5).to(getattr(torch, stored))
    unread = torch.arange(rows) >= start[-1] if gathered else (expert < 0).all(1)
    unused = start[1:] == start[:-1]
    if scales:
        x.view(torch.uint8)[unread] = weight.view(torch.uint8)[unused] = 0x7F  # NaN of floats
        made["x_scale"][unread] = made["weight_scale"][unused] = NAN
    else:
        x[unread] = weight[unused] = NAN
    return {"x": x, "weight": weight, **made}
