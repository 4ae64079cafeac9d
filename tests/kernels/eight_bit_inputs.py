"""Inputs of products of 8 bits, floats and integers, and of what quantizes by blocks and widens again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from case import FLOATS, Case, Random


def quantize_fp8_block(op: str) -> Iterator[Case]:
    shapes = [(6, 8, 4), (1, 1, 4), (128, 256, 128), (200, 384, 128), (37, 50, 16)]
    for seed, ((rows, width, block), dtype) in enumerate(itertools.product(shapes, FLOATS)):
        x = Random(seed).normal(rows, width, dtype=dtype)
        yield Case(op, f"{rows}x{width}x{block}-{dtype}", {"x": x}, {"block": block})
    yield Case(op, "zero", {"x": torch.zeros(5, 8)}, {"block": 4})


def dequantize_fp8(op: str) -> Iterator[Case]:
    shapes = [(6, 8, 4), (1, 1, 4), (128, 256, 128), (200, 384, 128), (37, 50, 16)]
    for seed, ((rows, width, block), dtype) in enumerate(itertools.product(shapes, FLOATS)):
        random, attrs = Random(seed), {"out_dtype": dtype}
        scales, more = (rows,), {}
        if op.endswith("_block"):
            scales, more = (-(-rows // block), -(-width // block)), {"block": block}
        operands = {"q": _eight_bits(op)(random, rows, width), "scale": random.uniform(*scales)}
        yield Case(op, f"{rows}x{width}x{block}-{dtype}", operands, attrs | more)


def fp8(random: Random, *shape: int) -> torch.Tensor:
    """Every magnitude of the format, the largest included."""
    return random.normal(*shape, scale=60).clamp(-448, 448).to(torch.float8_e4m3fn)


def _int8(random: Random, *shape: int) -> torch.Tensor:
    """Every number of the format, -128 included, which files may hold."""
    return random.normal(*shape, scale=60).clamp(-128, 127).round().to(torch.int8)


def _eight_bits(op: str) -> Callable[..., torch.Tensor]:
    return _int8 if "int8" in op else fp8


LINEAR_OUT = (("bfloat16", None), ("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", None))


def linear_fp8(op: str) -> Iterator[Case]:
    shapes = [(3, 16, 7), (1, 1, 1), (1, 576, 192), (17, 96, 33), (129, 64, 64), (5, 4096, 48)]
    for seed, ((tokens, inputs, outputs), (out, bias)) in enumerate(itertools.product(shapes, LINEAR_OUT)):
        random = Random(seed)
        made = _eight_bits(op)
        operands = {"x": made(random, tokens, inputs), "x_scale": random.uniform(tokens, 1) / 100}
        operands |= {"weight": made(random, outputs, inputs), "weight_scale": random.uniform(outputs) / 500}
        if bias:
            operands["bias"] = random.normal(outputs, dtype=bias)
        yield Case(op, f"{tokens}x{inputs}x{outputs}-{bias}-{out}", operands, {"out_dtype": out})


def linear_int8(op: str) -> Iterator[Case]:
    """Those of 8-bit floats, and the largest sums that there can be, which fp32 does not hold."""
    yield from linear_fp8(op)
    for x, inputs in ((127, 4099), (-127, 1041), (-128, 131)):
        operands = {"x": torch.full((3, inputs), x, dtype=torch.int8), "x_scale": torch.ones(3, 1) / 977}
        weight = torch.full((5, inputs), -128, dtype=torch.int8)
        weight[::2, ::3] = 127
        operands |= {"weight": weight, "weight_scale": torch.ones(5) / 33}
        yield Case(op, f"{x}-{inputs}", operands, {"out_dtype": "float32"})


def linear_fp8_block(op: str) -> Iterator[Case]:
    shapes = [(3, 32, 7, 16), (1, 8, 1, 8), (1, 512, 192, 128), (17, 128, 128, 128), (9, 384, 300, 128)]
    for seed, ((tokens, inputs, outputs, block), (out, bias)) in enumerate(
        itertools.product(shapes, LINEAR_OUT)
    ):
        random = Random(seed)
        groups, bands = inputs // block, -(-outputs // block)
        operands = {"x": fp8(random, tokens, inputs), "x_scale": random.uniform(tokens, groups) / 100}
        operands |= {"weight": fp8(random, outputs, inputs)}
        operands |= {"weight_scale": random.uniform(bands, groups) / 500}
        if bias:
            operands["bias"] = random.normal(outputs, dtype=bias)
        attrs = {"out_dtype": out, "block": block}
        yield Case(op, f"{tokens}x{inputs}x{outputs}/{block}-{bias}-{out}", operands, attrs)
