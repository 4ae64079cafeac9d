"""Inputs of the ops of MXFP4: blocks and spans that are not full, scales over many orders of magnitude."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from case import NAN, Case, Random
from moe_inputs import entries, used

from makeready.kernels.integers import pack_words, tiles


def mx_weights(random: Random, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    """Words and scales of 2^-12 to 2^4; what fills spans up is anything."""
    scale = random.integers(17, outputs, -(-inputs // 32)) + 115
    return {
        "weight": pack_words(random.integers(16, outputs, -(-inputs // 128) * 128), 4),
        "weight_scale": tiles(scale.to(torch.uint8)),
    }


def grouped_linear_mx(op: str) -> Iterator[Case]:
    shapes = [(7, 8, 2, 128, 64), (1, 5, 1, 32, 128), (21, 12, 3, 160, 64), (40, 6, 3, 64, 192)]
    for seed, ((tokens, experts, k, inputs, outputs), act) in enumerate(
        itertools.product(shapes, ("float32", "bfloat16"))
    ):
        for label, where, rows, top_k in entries(tokens, experts, k):
            random = Random(seed)
            x = random.normal(rows, inputs, dtype=act)
            x[used(where, rows, top_k) :] = NAN
            made = [mx_weights(random, outputs, inputs) for _ in range(experts)]
            stacked = {name: torch.stack([one[name] for one in made]) for name in made[0]}
            unused = where["start"][1:] == where["start"][:-1]
            unused[0] = False  # plans that are deterministic try the machine's products with the first one
            stacked["weight_scale"][unused] = 255  # NaN
            attrs = {"top_k": top_k, "out_dtype": ""}
            label = f"{tokens}x{experts}x{inputs}x{outputs}-{label}-{act}"
            yield Case(op, label, {"x": x, **stacked, **where}, attrs)


def repack_bytes(op: str) -> Iterator[Case]:
    for outputs, inputs in ((70, 256), (1, 32), (64, 160), (131, 2880)):
        q = Random(inputs).integers(256, outputs, inputs // 2).to(torch.uint8)
        yield Case(op, f"{outputs}x{inputs}", {"q": q}, {"inputs": inputs})
