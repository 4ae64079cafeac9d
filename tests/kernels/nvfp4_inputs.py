"""Inputs of the ops that make NVFP4: damaged scales, rows of zeros, numbers over all orders of magnitude."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from case import Case, Random

from makeready.kernels.nvfp4 import LARGEST, LEAST

FP8 = torch.float8_e4m3fn
SHAPES = ((70, 16), (1, 1), (64, 10), (131, 33))  # outputs, blocks


def pair_scales(op: str) -> Iterator[Case]:
    for outputs, groups in SHAPES:
        scale = Random(groups).integers(256, outputs, groups).to(torch.uint8).view(FP8)
        yield Case(op, f"{outputs}x{groups}", {"scale": scale})


def check_global_scales(op: str) -> Iterator[Case]:
    for seed, ((outputs, groups), divides) in enumerate(
        itertools.product((*SHAPES, (20, 600)), (False, True))
    ):
        random = Random(seed)
        bits = random.integers(127, outputs, groups)
        for row, damage in zip(range(1, outputs, 3), itertools.cycle((0x7F, 0x80, 0x81, 0xC0, 0xFF))):
            bits[row, (row * 7) % groups] = damage  # minus zero is none
        operands = {"given": random.uniform(outputs), "scale": bits.to(torch.uint8).view(FP8)}
        yield Case(op, f"{outputs}x{groups}-{divides}", operands, {"divides": divides})


def wide() -> Iterator[tuple[str, torch.Tensor]]:
    for seed, ((outputs, inputs), dtype) in enumerate(
        itertools.product(
            ((70, 256), (1, 16), (3, 200), (130, 576), (5, 7)), ("float32", "bfloat16", "float16")
        )
    ):
        yield f"{outputs}x{inputs}-{dtype}", Random(seed).normal(outputs, inputs, dtype=dtype, scale=0.02)
    yield "awkward", awkward()


def awkward() -> torch.Tensor:
    """``[8, 96]``: ties of both signs, blocks whose scales are rounded to a tie, to nothing and among the smallest,
    and rows that are zero, near the ends of fp32, or not finite.
    """
    x = torch.zeros(8, 96)
    ties = torch.arange(16) / 4.0
    x[0, :16], x[0, 16:32], x[0, 32:48] = ties, -ties, ties * 1.4
    x[0, 48:64], x[0, 64:80], x[0, 80:] = ties / 1000, ties * 2.0**-9, 448 * 6
    x[1] = Random(1).normal(96) * 2.0 ** (torch.arange(96) // 16 * -4.0)
    x[2], x[3] = x[1] * 1e37, x[1] * 1e-38
    x[4, 3], x[5, 40], x[6, 70] = float("nan"), float("inf"), -float("inf")
    return x


def make_global_scales(op: str) -> Iterator[Case]:
    for label, x in wide():
        yield Case(op, label, {"x": x})


def quantize_nvfp4(op: str) -> Iterator[Case]:
    for label, x in wide():
        most = x.float().abs().amax(1)
        whole = torch.where(most.isfinite(), (most / LARGEST).clamp_min(LEAST), float("nan"))
        yield Case(op, label, {"x": x, "global_scale": whole})
